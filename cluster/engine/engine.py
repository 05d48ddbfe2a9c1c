"""One worker group at work: its scheduler, its plans in flight, its accounting."""

from __future__ import annotations

from typing import Any

from ...protos.errors import KvartoError, UnavailableError
from ...protos.request import AddRequest, Delta, EngineInfo, RequestError
from ...protos.step import StepResult
from .. import admission
from ..metrics import Metrics
from ..scheduler import Scheduler
from .transport import GroupFailedError, WorkerGroupLink

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
    ) -> None:
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
        # Sums over all steps: their ratio is the internal waste (DESIGN invariant 4).
        self._slots_used = 0
        self._slots_allocated = 0
        self._num_steps = 0

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
            plan = self.scheduler.schedule()
            if plan is None:
                break
            self._in_flight[plan.step_id] = now
            self.link.send(plan)
            used, allocated = self.scheduler.space.slots
            self._slots_used += used
            self._slots_allocated += allocated
            self._num_steps += 1
            if self._check_integrity:
                self.scheduler.space.check_integrity()

    def receive(self, now: float, news: News) -> None:
        """Append the deltas of all results that have arrived; those of a request that has ended are owed to it even if
        the group fails now. Raises `GroupFailedError` on an error or a silent group."""
        for result in self.link.receive():
            news.extend(self._take(result, now))
        if not self._in_flight:
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
        space = self.scheduler.space
        return {
            "epoch": self.info.epoch,
            "num_running": self.scheduler.num_running,
            "num_waiting": self.scheduler.num_waiting,
            "num_preemptions": self.scheduler.num_preemptions,
            "num_steps": self._num_steps,
            "blocks": {"total": space.num_blocks, "free": space.num_free, "used": space.num_used,
                       "releasing": space.num_releasing},
            "slots_used": self._slots_used,
            "slots_allocated": self._slots_allocated,
            "kv_waste": 1 - self._slots_used / self._slots_allocated if self._slots_allocated else 0.0,
            "since_progress_s": now - self.last_progress_s if self.load else 0.0,
        }

    def _take(self, result: StepResult, now: float) -> News:
        if result.epoch != self.info.epoch or result.step_id not in self._in_flight:
            return []
        self._metrics.step_seconds.observe(now - self._in_flight.pop(result.step_id))
        self.last_progress_s = now
        self.last_step_id = result.step_id
        news: News = []
        for group, delta in self.scheduler.update(result):
            self._metrics.on_delta(group, delta, now)
            news.append((group.owner, delta))
        if self._check_integrity:
            self.scheduler.space.check_integrity()
        return news
