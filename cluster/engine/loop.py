"""The Head's event loop: one thread that moves every message between frontends, schedulers and ranks."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection
from typing import Any

import msgspec

from ...protos.errors import KvartoError, UnavailableError
from ...protos.request import (
    AddRequest,
    CancelRequest,
    Delta,
    DeltaBatch,
    EngineInfo,
    Ping,
    Pong,
    Query,
    Reply,
    ToHead,
)
from ...protos.spans import Span
from ..metrics import Metrics
from ..router import pick_group
from .engine import Engine, News, error_delta
from .transport import GroupFailedError, Transport

logger = logging.getLogger(__name__)

HOUSEKEEPING_S = 0.5
"""How often leases are renewed and silent groups are looked for."""


class EngineLoop:
    """Runs until `stop`. `on_group_failed(index, reason)` is told of a dead worker group, on the loop's thread."""

    def __init__(
        self, transport: Transport, metrics: Metrics, *, on_group_failed: Callable[[int, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._metrics = metrics
        self._on_group_failed = on_group_failed
        self._clock = clock
        self._engines: dict[int, Engine] = {}
        self._joining: dict[int, tuple[Engine, Callable[[], None]]] = {}
        self._posted: deque[Callable[[], None]] = deque()
        self._next_housekeeping_s = 0.0
        self.last_heard_s = clock()
        """When a frontend last spoke, or the loop began; may be read from any thread."""
        self._draining = False
        self._leaving: set[int] = set()
        self._stopped = False
        self._num_groups = 0
        self._frontends: set[bytes] = set()

    @property
    def _epoch(self) -> int:
        return max((engine.info.epoch for engine in self._engines.values()), default=0)

    @property
    def infos(self) -> list[EngineInfo]:
        """Of every worker group that works now; may be read from any thread."""
        return [engine.info for engine in list(self._engines.values())]

    @property
    def num_unfinished(self) -> int:
        """Requests that have not had their last delta; may be read from any thread."""
        return sum(engine.load for engine in list(self._engines.values()))

    def post(self, action: Callable[[], None]) -> None:
        """Run `action` on the loop's thread; may be called from any thread."""
        self._posted.append(action)
        self._transport.wake()

    def add_group(self, index: int, engine: Engine, on_ready: Callable[[], None]) -> None:
        """Let a worker group work as soon as its ranks are connected. Call it on the loop's thread (`post`)."""
        self._joining[index] = engine, on_ready
        self._num_groups = max(self._num_groups, index + 1)

    def fail_group(self, index: int, reason: str, epoch: int) -> None:
        """A worker group is gone: its requests end. A report about a former epoch is dropped."""
        if index in self._joining and self._joining[index][0].info.epoch == epoch:
            engine = self._joining.pop(index)[0]
        elif index in self._engines and self._engines[index].info.epoch == epoch:
            engine = self._engines.pop(index)
            self._leaving.discard(index)
        else:
            return
        logger.error("worker group %d is gone: %s", index, reason)
        news = engine.fail(reason)
        self._deliver(news, epoch)
        # Whoever has just been told to try again must not be told by the next health check that all is well.
        for owner in {owner for owner, _ in news}:
            self._transport.send(owner, self._pong())
        engine.link.close()
        self._on_group_failed(index, reason)

    def drain(self) -> None:
        """Take no more requests; those that run may finish. Call it on the loop's thread (`post`)."""
        self._draining = True
        self._tell_frontends()

    def drain_groups(self, indices: Collection[int]) -> int:
        """Give these worker groups no more requests; how many they have left. A group that is started again takes
        requests again. Call it on the loop's thread (`post`)."""
        leaving = self._engines.keys() & indices
        if not leaving <= self._leaving:
            self._leaving |= leaving
            self._tell_frontends()
        return sum(self._engines[index].load for index in leaving)

    def stop(self) -> None:
        """End `run` and tell the ranks to end."""
        self._stopped = True
        self._transport.wake()

    def run(self) -> None:
        try:
            while not self._stopped:
                self.run_once()
        finally:
            for engine in [*self._engines.values(), *(engine for engine, _ in self._joining.values())]:
                engine.link.close()
            self._transport.close()

    def run_once(self) -> None:
        """Wait for something to happen and deal with all that has."""
        if not any(engine.link.has_result for engine in self._engines.values()):
            self._transport.wait(max(0.0, self._next_housekeeping_s - self._clock()))
        while self._posted:
            self._posted.popleft()()
        # Before the messages: whoever started a group asks for it at once.
        for index in [index for index, (engine, _) in self._joining.items() if engine.link.connected]:
            self._engines[index], on_ready = self._joining.pop(index)
            on_ready()
        for owner, message in self._transport.receive():
            self.last_heard_s = self._clock()
            self._frontends.add(owner)
            self._handle(owner, message)
        for index, engine in list(self._engines.items()):
            news: News = []
            failure = None
            try:
                engine.receive(self._clock(), news)
                engine.pump(self._clock())
            except GroupFailedError as error:
                failure = str(error)
            except Exception as error:
                # A defect must cost one group's requests, not everybody's answers: the loop goes on.
                logger.exception("worker group %d: defect", index)
                failure = f"{type(error).__name__}: {error}"
            # The ranks have their next plan before the frontends hear of the last one.
            if news:
                with Span("send deltas"):
                    self._deliver(news, engine.info.epoch, engine.last_step_id)
            if failure is not None:
                self.fail_group(index, failure, engine.info.epoch)
        if self._clock() >= self._next_housekeeping_s:
            self._keep_house()

    def _handle(self, owner: bytes, message: ToHead) -> None:
        if isinstance(message, AddRequest):
            try:
                self._add(owner, message)
            except Exception as caught:
                if isinstance(caught, KvartoError):
                    error = caught
                else:
                    logger.exception("a request could not be queued: defect")
                    error = KvartoError(f"{type(caught).__name__}: {caught}")
                self._metrics.requests_failed.inc()
                self._deliver([(owner, error_delta(message.request_id, error))], self._epoch)
        elif isinstance(message, CancelRequest):
            self._cancel(owner, message.request_id, message.seq_index)
        elif isinstance(message, Query):
            if message.what == "drain":
                self.drain()
            self._transport.send(owner, Reply(query_id=message.query_id, body=self._answer(message.what)))
        elif isinstance(message, Ping):
            self._transport.send(owner, self._pong())

    def _add(self, owner: bytes, request: AddRequest) -> None:
        if self._draining:
            raise UnavailableError("the server is shutting down and takes no more requests")
        index = pick_group({
            index: engine.load for index, engine in self._engines.items() if index not in self._leaving})
        if index is None:
            raise UnavailableError(
                "no worker group is ready: one is being started or drained, try again in a few seconds")
        self._engines[index].add(owner, request, self._clock())

    def _cancel(self, owner: bytes, request_id: str, seq_index: int | None = None) -> None:
        for engine in self._engines.values():
            engine.scheduler.cancel(owner, request_id, seq_index)

    def _pong(self) -> Pong:
        reason = self._why_not_ready()
        return Pong(epoch=self._epoch, ready=not reason, reason=reason)

    def _tell_frontends(self) -> None:
        """Whether the application is ready, before they ask: health checks go by what they have heard last."""
        for owner in list(self._frontends):
            if not self._transport.send(owner, self._pong()):
                self._drop_frontend(owner)

    def _why_not_ready(self) -> str:
        """By progress, so that load alone never counts; empty when all is well."""
        if self._draining:
            return "the server is shutting down"
        if not self._engines:
            return "no worker group is ready"
        if self._engines.keys() <= self._leaving:
            return "every worker group that is ready is on a node that is being drained"
        stuck = [index for index, engine in self._engines.items() if engine.is_stuck(self._clock())]
        return f"worker group {stuck[0]} has work and ends no step" if stuck else ""

    def _deliver(self, news: News, epoch: int, step_id: int | None = None) -> None:
        """One message per frontend with all that a step brought its requests."""
        by_owner: defaultdict[bytes, list[Delta]] = defaultdict(list)
        for owner, delta in news:
            by_owner[owner].append(delta)
        for owner, deltas in by_owner.items():
            if not self._transport.send(owner, DeltaBatch(epoch=epoch, step_id=step_id, deltas=deltas)):
                self._drop_frontend(owner)

    def _drop_frontend(self, owner: bytes) -> None:
        self._frontends.discard(owner)
        gone = [group.request.request_id for engine in self._engines.values() for group in engine.scheduler.groups
                if group.owner == owner]
        logger.warning("a frontend is gone: cancelling its %d requests", len(gone))
        for request_id in gone:
            self._cancel(owner, request_id)

    def _keep_house(self) -> None:
        self._next_housekeeping_s = self._clock() + HOUSEKEEPING_S
        for engine, _ in self._joining.values():
            # Ranks that are connected wait for those that are not yet.
            with contextlib.suppress(GroupFailedError):
                engine.link.renew_lease()
        for index, engine in list(self._engines.items()):
            try:
                engine.link.renew_lease()
            except GroupFailedError as error:
                self.fail_group(index, str(error), engine.info.epoch)

    def _answer(self, what: str) -> dict[str, Any]:
        if what == "info":
            return {"info": [msgspec.to_builtins(info) for info in self.infos]}
        if what == "blocks":
            return {"groups": {str(index): engine.block_map() for index, engine in self._engines.items()}}
        if what == "drain":
            return {"num_unfinished": self.num_unfinished}
        groups = {index: engine.status(self._clock()) for index, engine in self._engines.items()}
        if what == "metrics":
            return {"text": self._metrics.render(groups)}
        return {
            "draining": self._draining,
            "num_groups": self._num_groups,
            "num_groups_alive": len(groups),
            "groups": {str(index): status for index, status in groups.items()},
        }
