"""The engine behind a socket: a Head that may die and come back elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from ...protos.codec import decode_from_head, encode
from ...protos.endpoint import Endpoint, connect_dealer
from ...protos.errors import UnavailableError
from ...protos.request import Ping, ToHead
from .client import EngineClient

logger = logging.getLogger(__name__)

PING_S = 0.5
SILENCE_S = 15.0
"""A Head that is connected but answers no ping for so long is stopped, not busy: its loop never waits for a step."""
RETRY_S = 0.3


class ZmqConnection:
    """An `EngineConnection` over CURVE-secured sockets. `locate` asks Ray where the Head is now."""

    def __init__(self, client: EngineClient, locate: Callable[[], Awaitable[Endpoint]]) -> None:
        self._client = client
        self._locate = locate
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._heard_s = 0.0

    @classmethod
    async def start(cls, client: EngineClient, locate: Callable[[], Awaitable[Endpoint]]) -> ZmqConnection:
        """Connect to the Head that `locate` finds. Raises what `locate` raises."""
        self = cls(client, locate)
        endpoint = await locate()
        connected = asyncio.Event()
        self._task = asyncio.create_task(self._keep_connected(endpoint, connected))
        await connected.wait()
        return self

    def send(self, message: ToHead) -> None:
        if self._socket is None:
            raise UnavailableError("the Head is gone: it is being started again, try again in a few seconds")
        # Queued without limit: the future is done at once.
        self._socket.send(encode(message))

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._context.destroy(linger=200)

    async def _keep_connected(self, endpoint: Endpoint, connected: asyncio.Event) -> None:
        while True:
            try:
                reason = await self._serve(endpoint, connected)
            except Exception as error:
                logger.exception("the connection to the Head: defect")
                reason = f"{type(error).__name__}: {error}"
            logger.warning("lost the Head: %s", reason)
            self._client.lost(f"the Head is gone ({reason}); try again in a few seconds")
            endpoint = await self._find_again()

    async def _find_again(self) -> Endpoint:
        """Where the Head is now: at a new place if it died, at the same if only the connection broke."""
        while True:
            await asyncio.sleep(RETRY_S)
            try:
                return await self._locate()
            except Exception as error:
                logger.info("no Head yet: %s", error)

    async def _serve(self, endpoint: Endpoint, connected: asyncio.Event) -> str:
        """Move messages until the Head is lost; returns why."""
        socket = connect_dealer(self._context, endpoint, uuid.uuid4().bytes)
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._socket = socket
        self._heard_s = time.monotonic()
        connected.set()
        tasks = [
            asyncio.create_task(self._receive(socket)), asyncio.create_task(self._watch(monitor)),
            asyncio.create_task(self._ping(socket))]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(iter(done)).result()
        finally:
            self._socket = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            socket.disable_monitor()
            socket.close(linger=200)

    async def _receive(self, socket: zmq.asyncio.Socket) -> str:
        while True:
            message = decode_from_head(await socket.recv())
            self._heard_s = time.monotonic()
            self._client.take(message)

    async def _watch(self, monitor: zmq.asyncio.Socket) -> str:
        parse_monitor_message(await monitor.recv_multipart())
        return "its connection closed"

    async def _ping(self, socket: zmq.asyncio.Socket) -> str:
        while time.monotonic() - self._heard_s < SILENCE_S:
            await socket.send(encode(Ping()))
            await asyncio.sleep(PING_S)
        return f"it has been silent for {SILENCE_S:g} s"
