"""Exceptions to OpenAI's error format."""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from ...protos.errors import (
    AuthenticationError,
    KvartoError,
    ModelNotFoundError,
    PermissionDeniedError,
    PromptTooLongError,
    UnavailableError,
)
from .replies import ErrorBody, ErrorDetail

logger = logging.getLogger("kvarto.http")

CLIENT_GONE = 499
"""nginx's status for a client that went away. Nobody receives it; it is for the access log."""

_CODES: dict[type[KvartoError], str] = {
    AuthenticationError: "invalid_api_key",
    ModelNotFoundError: "model_not_found",
    PermissionDeniedError: "permission_denied",
    PromptTooLongError: "context_length_exceeded",
    UnavailableError: "unavailable",
}


def error_body(message: str, status: int, *, param: str | None = None, code: str | None = None) -> ErrorBody:
    """OpenAI's error object, whose `type` follows from the status."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return ErrorBody(ErrorDetail(message, kind, param, code))


def describe(error: Exception) -> tuple[int, ErrorBody]:
    """Status and body for `error`. What kvarto did not raise on purpose is logged and its text kept from the client."""
    if isinstance(error, KvartoError):
        body = error_body(error.message, error.http_status, param=error.param, code=_CODES.get(type(error)))
        return error.http_status, body
    logger.error("a request failed unexpectedly", exc_info=error)
    return 500, error_body("internal error; the server's log says more", 500)


def json_response(body: msgspec.Struct, status: int = 200) -> Response:
    """`body` as JSON."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


def error_response(error: Exception) -> Response:
    """A whole response for `error`."""
    status, body = describe(error)
    response = json_response(body, status)
    if isinstance(error, AuthenticationError):
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


class OpenAIRoute(APIRoute):
    """A route whose failures, those of its dependencies included, are answered in OpenAI's error format."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, with every exception answered."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except ClientDisconnect:
                return Response(status_code=CLIENT_GONE)
            except HTTPException:
                raise
            except Exception as error:
                return error_response(error)

        return answer


async def on_http_exception(request: Request, error: Exception) -> Response:
    """No such path, or a method that it does not have: FastAPI's own refusals."""
    if not isinstance(error, HTTPException):
        raise error
    message = f"{error.detail}: {request.method} {request.url.path}"
    response = json_response(error_body(message, error.status_code), error.status_code)
    response.headers.update(error.headers or {})
    return response
