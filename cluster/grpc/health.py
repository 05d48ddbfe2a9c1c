"""`grpc.health.v1`, answered from the frontend's own health."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import suppress

import grpc  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]

from ..frontend_protocol import Frontend

WATCH_PERIOD_S = 1.0


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Serving while the frontend is ready and the server is not draining."""

    def __init__(self, frontend: Frontend, service_names: Collection[str]) -> None:
        self._frontend = frontend
        self._names = frozenset(service_names) | {""}
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """Say NOT_SERVING from now on, and end the watches: they would hold the server's shutdown."""
        self._draining.set()

    async def Check(self, request: health_pb2.HealthCheckRequest,
                    context: grpc.aio.ServicerContext) -> health_pb2.HealthCheckResponse:
        """The status of a service now."""
        if request.service not in self._names:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service '{request.service}' here")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: health_pb2.HealthCheckRequest,
                    context: grpc.aio.ServicerContext) -> AsyncIterator[health_pb2.HealthCheckResponse]:  # noqa: ARG002
        """The status of a service now and whenever it changes."""
        last = None
        while True:
            status = self._status(request.service)
            if status != last:
                last = status
                yield health_pb2.HealthCheckResponse(status=status)
            if self._draining.is_set():
                return
            with suppress(TimeoutError):
                await asyncio.wait_for(self._draining.wait(), WATCH_PERIOD_S)

    def _status(self, service: str) -> int:
        status = health_pb2.HealthCheckResponse
        if service not in self._names:
            return int(status.SERVICE_UNKNOWN)
        serving = not self._draining.is_set() and self._frontend.health().ready
        return int(status.SERVING if serving else status.NOT_SERVING)
