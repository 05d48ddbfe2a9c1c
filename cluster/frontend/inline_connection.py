"""The engine in this process, on a thread of its own."""

from __future__ import annotations

import asyncio
import threading

from ...protos.config import EngineConfig
from ...protos.request import FromHead, Ping, ToHead
from ..engine.inline import InlineTransport
from ..engine.loop import EngineLoop
from ..launcher.inline import start_inline
from ..metrics import Metrics
from .client import EngineClient


class InlineConnection:
    """An `EngineConnection` without Ray and sockets. Made by `start`, on the event loop of `client`."""

    def __init__(self, client: EngineClient, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._event_loop = loop
        self._transport = InlineTransport(self._deliver)
        self._metrics = Metrics()
        self._engine_loop = EngineLoop(self._transport, self._metrics, on_group_failed=self._on_group_failed)
        self._thread = threading.Thread(target=self._engine_loop.run, name="engine-loop", daemon=True)

    @classmethod
    async def start(cls, client: EngineClient, config: EngineConfig) -> InlineConnection:
        """Load the model and start the engine's thread. Raises `ConfigError` and its kin."""
        self = cls(client, asyncio.get_running_loop())
        engine = await asyncio.to_thread(start_inline, config, self._metrics)
        self._engine_loop.add_group(0, engine, on_ready=lambda: None)
        self._thread.start()
        self.send(Ping())
        return self

    def send(self, message: ToHead) -> None:
        self._transport.submit(message)

    async def close(self) -> None:
        self._engine_loop.stop()
        await asyncio.to_thread(self._thread.join)

    def _deliver(self, message: FromHead) -> None:
        if not self._event_loop.is_closed():
            self._event_loop.call_soon_threadsafe(self._client.take, message)

    def _on_group_failed(self, index: int, reason: str) -> None:  # noqa: ARG002
        self._event_loop.call_soon_threadsafe(self._client.lost, f"the engine stopped: {reason}")
