"""The HTTP API on a port of its own, without a proxy before it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

import uvicorn

from ...protos.config import ServeConfig
from ...protos.errors import ResourcesError, UnavailableError
from ..frontend_protocol import Frontend
from .app import create_app

BACKLOG = 2048
KEEP_ALIVE_S = 90
"""As Serve's proxy: clients with a pool of connections come back after longer than uvicorn's 5 s."""


class HttpServer:
    """Serves the app at `config.host` and `config.port`, in the event loop that `start` runs in."""

    def __init__(self, get_frontend: Callable[[], Awaitable[Frontend]], config: ServeConfig) -> None:
        self._config = config
        self._app = create_app(get_frontend, config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen; the port in use. Raises `ResourcesError` when the port is taken."""
        listener = self._listen()
        server = uvicorn.Server(uvicorn.Config(
            self._app, log_level="warning", access_log=False, timeout_keep_alive=KEEP_ALIVE_S))
        self._serving = asyncio.create_task(server.serve([listener]))
        return int(listener.getsockname()[1])

    def check(self) -> None:
        """Raises `UnavailableError` when the server has ended: what it listened to is closed then."""
        if self._serving is not None and self._serving.done():
            raise UnavailableError("the HTTP server has ended")

    def _listen(self) -> socket.socket:
        host, port = self._config.host, self._config.port
        listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise ResourcesError(
                f"the HTTP server cannot listen on {host}:{port}: {error.strerror}; free the port, or choose another "
                "with port (0: any free one)", param="port") from None
        return listener
