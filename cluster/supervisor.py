"""Keeps every worker group alive: one thread each that starts it, watches it and starts it again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol

from ..protos.errors import UnavailableError
from .engine.engine import Engine

logger = logging.getLogger(__name__)

WATCH_S = 0.2
MAX_BACKOFF_S = 30.0


class RunningGroup(Protocol):
    """A worker group that was started for one epoch."""

    engine: Engine

    def dead_rank(self, timeout_s: float) -> str | None:
        """Which rank has ended and why, waiting up to `timeout_s` for one to; None: all live."""

    def end(self) -> None:
        """Kill what still lives of it and give its resources back."""


class GroupHost(Protocol):
    """What the supervisor needs of the engine loop (`EngineLoop`)."""

    def post(self, action: Callable[[], None]) -> None:
        """Run `action` on the loop's thread."""

    def add_group(self, index: int, engine: Engine, on_ready: Callable[[], None]) -> None:
        """On the loop's thread: let the group work as soon as its ranks are connected."""

    def fail_group(self, index: int, reason: str, epoch: int) -> None:
        """On the loop's thread: the group is gone."""


class Supervisor:
    """`start(index, epoch)` brings up one worker group, with an epoch that no group had before."""

    def __init__(
        self, start: Callable[[int, int], RunningGroup], host: GroupHost, num_groups: int, *, first_epoch: int = 1,
    ) -> None:
        self._start = start
        self._host = host
        self._epoch_lock = threading.Lock()
        self._last_epoch = first_epoch - 1
        self._stopped = threading.Event()
        self._failed = [threading.Event() for _ in range(num_groups)]
        self._ready = [threading.Event() for _ in range(num_groups)]
        self._reasons = [""] * num_groups
        self._has_settled = [False] * num_groups
        self._first_error: BaseException | None = None
        self._settled = threading.Semaphore(0)
        self._threads = [
            threading.Thread(target=self._keep, args=(index,), name=f"group-{index}", daemon=True)
            for index in range(num_groups)]

    def start(self) -> None:
        """Start all groups and return when all are ready. Raises what the first that failed to start raised; the
        others are ended then."""
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            self._settled.acquire()
        if self._first_error is not None:
            self.stop()
            raise self._first_error

    def on_group_failed(self, index: int, reason: str) -> None:
        """The engine loop has given a group up: it must be started again."""
        self._reasons[index] = reason
        self._failed[index].set()

    def stop(self) -> None:
        """End all groups and return when they have ended."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _keep(self, index: int) -> None:
        """Start group `index` again and again. A failure before it was ever ready is `start`'s to raise."""
        backoff_s = 0.5
        while not self._stopped.is_set():
            error = self._run_once(index)
            if self._ready[index].is_set():
                backoff_s = 0.5
                continue
            if error is None or not self._has_settled[index]:
                self._first_error = self._first_error or error
                break
            logger.error("worker group %d did not start; next try in %.1f s", index, backoff_s, exc_info=error)
            self._stopped.wait(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
        self._settle(index)

    def _settle(self, index: int) -> None:
        """`start` need not wait for this group any longer."""
        if not self._has_settled[index]:
            self._has_settled[index] = True
            self._settled.release()

    def _run_once(self, index: int) -> Exception | None:
        """One life of a group: what it ended of; None: it was stopped. `_ready` says whether it ever worked."""
        with self._epoch_lock:
            self._last_epoch += 1
            epoch = self._last_epoch
        self._failed[index].clear()
        self._ready[index].clear()
        group: RunningGroup | None = None
        try:
            group = self._start(index, epoch)
            self._host.post(partial(self._host.add_group, index, group.engine, self._ready[index].set))
            return self._watch(index, group, epoch)
        except Exception as error:
            self._host.post(partial(self._host.fail_group, index, str(error), epoch))
            return error
        finally:
            if self._ready[index].is_set():
                self._settle(index)
            if group is not None:
                try:
                    group.end()
                except Exception:
                    logger.exception("worker group %d could not be ended whole", index)

    def _watch(self, index: int, group: RunningGroup, epoch: int) -> Exception | None:
        while not self._stopped.is_set():
            if self._ready[index].is_set():
                self._settle(index)
            if self._failed[index].is_set():
                return UnavailableError(f"worker group {index} is gone: {self._reasons[index]}")
            if reason := group.dead_rank(WATCH_S):
                self._host.post(partial(self._host.fail_group, index, reason, epoch))
                while not self._failed[index].wait(WATCH_S) and not self._stopped.is_set():
                    pass
        return None
