"""Keeps every worker group alive: one thread each that starts it, watches it and starts it again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import partial
from typing import Protocol

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

    def __init__(self, start: Callable[[int, int], RunningGroup], host: GroupHost, num_groups: int) -> None:
        self._start = start
        self._host = host
        self._epoch_lock = threading.Lock()
        self._last_epoch = 0
        self._stopped = threading.Event()
        self._failed = [threading.Event() for _ in range(num_groups)]
        self._ready = [threading.Event() for _ in range(num_groups)]
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

    def on_group_failed(self, index: int, reason: str) -> None:  # noqa: ARG002
        """The engine loop has given a group up: it must be started again."""
        self._failed[index].set()

    def stop(self) -> None:
        """End all groups and return when they have ended."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _keep(self, index: int) -> None:
        backoff_s, settled = 0.5, False
        while not self._stopped.is_set():
            with self._epoch_lock:
                self._last_epoch += 1
                epoch = self._last_epoch
            try:
                group = self._start(index, epoch)
            except Exception as error:
                if not settled:
                    self._first_error = self._first_error or error
                    self._settled.release()
                    return
                logger.exception("worker group %d did not start; next try in %.1f s", index, backoff_s)
                self._stopped.wait(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)
                continue
            backoff_s = 0.5
            try:
                self._failed[index].clear()
                self._ready[index].clear()
                self._host.post(partial(self._host.add_group, index, group.engine, self._ready[index].set))
                settled = self._watch(index, group, settled)
            finally:
                group.end()

    def _watch(self, index: int, group: RunningGroup, settled: bool) -> bool:
        """Return when the group has failed or is to stop. Returns whether the first start has been reported."""
        epoch = group.engine.info.epoch
        while not self._stopped.is_set() and not self._failed[index].is_set():
            if reason := group.dead_rank(WATCH_S):
                self._host.post(partial(self._host.fail_group, index, reason, epoch))
                self._failed[index].wait()
            if not settled and self._ready[index].is_set():
                settled = True
                self._settled.release()
        return settled
