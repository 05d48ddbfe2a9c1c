"""An event loop on a thread of its own, for synchronous code that stands on an `AsyncLLM`."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")

SETTLE_S = 10.0
"""How long a start that was interrupted may take to end what it has started so far."""


class BackgroundLoop:
    """Never rests: a frontend whose caller is busy elsewhere must go on answering the Head."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="frontend", daemon=True)
        self._thread.start()

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine` returns or raises. Ctrl-C reaches the caller and cancels it."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        done: SimpleQueue[Future[T]] = SimpleQueue()
        future.add_done_callback(done.put)
        try:
            # Not `future.result()` at once: a Ctrl-C that comes while it takes its lock back is lost in an error of the
            # lock's. This wait is one call into C.
            return done.get().result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Let what was cancelled end, then stop."""
        self.run(_settle())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _settle() -> None:
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others, timeout=SETTLE_S)
