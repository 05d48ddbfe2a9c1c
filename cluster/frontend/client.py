"""A frontend's side of the engine, wherever that runs."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from ...protos.errors import UnavailableError
from ...protos.request import DeltaBatch, EngineInfo, FromHead, Pong, Query, Reply, ToHead


class EngineConnection(Protocol):
    """Carries messages to the Head; what comes back is handed to `EngineClient.take` on the event loop."""

    def send(self, message: ToHead) -> None:
        """Never blocks. Raises `UnavailableError` while there is no Head."""

    async def close(self) -> None:
        """Nothing is sent or received afterwards."""


class EngineClient:
    """Queries and their answers, health, and the deltas in between. Belongs to one event loop.

    `connection` is set once it is made; `on_deltas` and `on_lost` are set by whoever owns requests.
    """

    connection: EngineConnection

    def __init__(self) -> None:
        self.on_deltas: Callable[[DeltaBatch], None] = lambda _: None
        self.on_lost: Callable[[str], None] = lambda _: None
        self._queries: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._ids = itertools.count()
        self.last_pong: Pong | None = None

    def take(self, message: FromHead) -> None:
        """A message came from the Head."""
        if isinstance(message, DeltaBatch):
            self.on_deltas(message)
        elif isinstance(message, Reply):
            if (future := self._queries.pop(message.query_id, None)) and not future.done():
                future.set_result(message.body)
        else:
            self.last_pong = message

    def lost(self, reason: str) -> None:
        """The Head is gone: nothing that was asked of it will be answered."""
        self.last_pong = Pong(epoch=0, ready=False, reason=reason)
        for future in self._queries.values():
            if not future.done():
                future.set_exception(UnavailableError(reason))
        self._queries.clear()
        self.on_lost(reason)

    async def query(self, what: str, timeout_s: float = 10.0) -> dict[str, Any]:
        """Ask the Head for what `Query` names. Raises `UnavailableError`."""
        query_id = next(self._ids)
        future = self._queries[query_id] = asyncio.get_running_loop().create_future()
        self.connection.send(Query(query_id=query_id, what=what))
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            self._queries.pop(query_id, None)
            raise UnavailableError(f"the Head did not answer within {timeout_s:g} s") from None

    async def info(self) -> EngineInfo:
        """What the first living worker group says of itself. Raises `UnavailableError` when none lives."""
        infos = (await self.query("info"))["info"]
        if not infos:
            raise UnavailableError("no worker group is ready: one is being started, try again in a few seconds")
        return msgspec.convert(infos[0], EngineInfo)
