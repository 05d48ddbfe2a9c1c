"""The API key of every call except health checks, which probes make without one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc  # type: ignore[import-untyped]

from ...protos.errors import AuthenticationError
from ..http.auth import check_bearer

_OPEN = "/grpc.health.v1.Health/"


class KeyInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls whose metadata lacks `authorization: Bearer <key>`."""

    def __init__(self, api_key: str) -> None:
        self._api_key = api_key

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]],
                                handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The call's handler, or one that refuses it."""
        if not handler_call_details.method.startswith(_OPEN):
            value = dict(handler_call_details.invocation_metadata).get("authorization", "")
            try:
                check_bearer(value.encode() if isinstance(value, str) else value, self._api_key)
            except AuthenticationError as error:
                return _refusal(error.message)
        return await continuation(handler_call_details)


def _refusal(message: str) -> grpc.RpcMethodHandler:
    async def refuse(_request: Any, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)

    return grpc.unary_unary_rpc_method_handler(refuse)
