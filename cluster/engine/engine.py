"""One worker group at work: its scheduler, its plans in flight, its accounting."""

from __future__ import annotations

import logging
from typing import Any

from ...protos.errors import KvartoError, UnavailableError
from ...protos.request import AddRequest, Delta, EngineInfo, RequestError
from ...protos.spans import Span
from ...protos.step import StepResult
from .. import admission
from ..metrics import Metrics
from ..scheduler import Scheduler
from .accounting import Accounting
from .transport import GroupFailedError, WorkerGroupLink

logger = logging.getLogger(__name__)

News = list[tuple[bytes, Delta]]
"""Deltas with the frontend that each is for."""


STUCK_S = 30.0
"""Longer than any step that a group in good health takes."""


def error_delta(request_id: str, error: KvartoError) -> Delta:
    return Delta(request_id=request_id, error=RequestError(
        name=type(error).__name__, message=error.message, param=error.param))


class Engine:
    """Keeps up to `link.max_in_flight` plans with the ranks. Time is passed in, in seconds of a monotonic clock."""

    def __init__(
        self, scheduler: Scheduler, link: WorkerGroupLink, info: EngineInfo, metrics: Metrics, *,
        async_scheduling: bool, step_timeout_s: float, check_integrity: bool = False,
        block_bytes: list[int] | None = None,
    ) -> None:
        """`block_bytes`: of one block of each KV group, over all ranks."""
        self.scheduler = scheduler
        self.link = link
        self.info = info
        self._metrics = metrics
        self._max_in_flight = link.max_in_flight if async_scheduling else 1
        self._step_timeout_s = step_timeout_s
        self._check_integrity = check_integrity
        self._in_flight: dict[int, float] = {}
        self.last_progress_s = 0.0
        self.last_step_id: int | None = None
        self._accounting = Accounting(scheduler, block_bytes or [])

    @property
    def load(self) -> int:
        """Requests that are not finished: what the router balances."""
        return self.scheduler.num_unfinished

    def is_stuck(self, now: float) -> bool:
        """Work is waiting and no step has ended for `STUCK_S`: health is progress, not an answer in time."""
        return self.load > 0 and now - self.last_progress_s > STUCK_S

    def add(self, owner: bytes, request: AddRequest, now: float) -> None:
        """Queue a request. Raises `InvalidRequestError` or `PromptTooLongError`; nothing is taken then."""
        max_tokens = admission.check(request.prompt_token_ids, request.params, self.info)
        if not self.load and not self._in_flight:
            self.last_progress_s = now
        self.scheduler.add(request, owner, max_tokens).arrived_s = now

    def pump(self, now: float) -> None:
        """Send plans as long as there is something to compute and room in flight."""
        while len(self._in_flight) < self._max_in_flight:
            with Span("schedule"):
                plan = self.scheduler.schedule()
            if plan is None:
                break
            self._in_flight[plan.step_id] = now
            with Span("send plan"):
                self.link.send(plan)
            self._accounting.on_plan(plan)
            self._log_preemptions()
            if self._check_integrity:
                self.scheduler.space.check_integrity()

    def receive(self, now: float, news: News) -> None:
        """Append the deltas of all results that have arrived; those of a request that has ended are owed to it even if
        the group fails now. Raises `GroupFailedError` on an error or a silent group."""
        for result in self.link.receive():
            news.extend(self._take(result, now))
        if not self._in_flight:
            if self.scheduler.awaits_loads and now - self.last_progress_s > self._step_timeout_s:
                raise GroupFailedError(f"a rank has not answered for its disk loads within {self._step_timeout_s:g} s")
            return
        # A plan that was sent ahead begins when the one before it ends.
        began_s = max(min(self._in_flight.values()), self.last_progress_s)
        if now - began_s > self._step_timeout_s:
            raise GroupFailedError(f"no result of step {min(self._in_flight)} within {self._step_timeout_s:g} s")

    def fail(self, reason: str) -> News:
        """End every request: the group is gone. The scheduler is not asked to: it may be what failed."""
        error = UnavailableError(f"the worker group that served this request is gone ({reason}); try again")
        groups = self.scheduler.groups
        self._metrics.requests_failed.inc(len(groups))
        return [(group.owner, error_delta(group.request.request_id, error)) for group in groups]

    def status(self, now: float) -> dict[str, Any]:
        return {
            "epoch": self.info.epoch,
            "num_running": self.scheduler.num_running,
            "num_waiting": self.scheduler.num_waiting,
            "since_progress_s": now - self.last_progress_s if self.load else 0.0,
            **self._accounting.status(),
        }

    def block_map(self) -> dict[str, Any]:
        """See `Accounting.block_map`."""
        return self._accounting.block_map()

    def _log_preemptions(self) -> None:
        records = self.scheduler.preemptor.records
        while records:
            record = records.popleft()
            logger.info(
                "preempted request %s (%d blocks, %d tokens) by %s: swap estimated at %.1f ms, recompute at %.1f ms%s",
                record.request_id, record.num_blocks, record.num_tokens, "swap" if record.swapped else "recompute",
                record.choice.swap_s * 1e3, record.choice.recompute_s * 1e3,
                "; the host has no room" if record.host_is_full and record.choice.swap else "")

    def _take(self, result: StepResult, now: float) -> News:
        if result.epoch != self.info.epoch:
            return []
        if result.rank != 0:
            self.scheduler.answered(result)
            return []
        if result.step_id not in self._in_flight:
            return []
        self._accounting.on_result(result)
        self._metrics.step_seconds.observe(now - self._in_flight.pop(result.step_id))
        self.last_progress_s = now
        self.last_step_id = result.step_id
        news: News = []
        with Span("take result"):
            for group, delta in self.scheduler.update(result):
                self._metrics.on_delta(group, delta, now)
                news.append((group.owner, delta))
        if self._check_integrity:
            self.scheduler.space.check_integrity()
        return news
