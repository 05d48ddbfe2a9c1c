"""A worker group and its frontend in this process: the same messages without Ray and without sockets."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from ...protos.request import FromHead, ToHead
from ...protos.step import StepPlan, StepResult
from .transport import GroupFailedError

logger = logging.getLogger(__name__)

OWNER = b"inline"


class Rank(Protocol):
    """One rank of an inline worker group."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Run a step. Raises what the step raises."""

    def close(self) -> None:
        """Let ranks that wait for this one fail instead."""


class InlineWorkerGroup:
    """Runs a plan when its result is asked for, so that deltas are sent before the next one is run: on the loop's own
    thread, or with several ranks on a thread each."""

    max_in_flight = 1

    def __init__(self, ranks: Sequence[Rank]) -> None:
        self._ranks = ranks
        self._threads = ThreadPoolExecutor(len(ranks), thread_name_prefix="rank") if len(ranks) > 1 else None
        self._plan: StepPlan | None = None

    def send(self, plan: StepPlan) -> None:
        self._plan = plan

    def receive(self) -> list[StepResult]:
        plan, self._plan = self._plan, None
        if plan is None:
            return []
        try:
            results = self._execute(plan)
        except Exception as error:
            logger.exception("step %d failed", plan.step_id)
            raise GroupFailedError(f"step {plan.step_id} failed: {error}") from error
        if not any(moves.disk_loads for moves in plan.moves):
            return results[:1]
        return results[:1] + [
            StepResult(epoch=plan.epoch, step_id=plan.step_id, rank=rank, failed_loads=result.failed_loads)
            for rank, result in enumerate(results) if rank > 0]

    @property
    def connected(self) -> bool:
        return True

    @property
    def has_result(self) -> bool:
        return self._plan is not None

    def renew_lease(self) -> None:
        """Nothing to renew: ranks and Head are one process."""

    def close(self) -> None:
        self._plan = None
        if self._threads is not None:
            self._threads.shutdown()
        # Whoever closed us may be kept alive by a cycle for long; the pools, gigabytes, are not to be.
        self._ranks = ()

    def _execute(self, plan: StepPlan) -> list[StepResult]:
        if self._threads is None:
            return [self._ranks[0].execute(plan)]

        def execute(rank: Rank) -> StepResult:
            try:
                return rank.execute(plan)
            except BaseException:
                rank.close()
                raise

        return list(self._threads.map(execute, self._ranks))


class InlineTransport:
    """Queues between the loop's thread and the frontend's. `deliver` is called on the loop's thread."""

    def __init__(self, deliver: Callable[[FromHead], None]) -> None:
        self._deliver = deliver
        self._inbox: queue.SimpleQueue[ToHead | None] = queue.SimpleQueue()
        self._peeked: list[ToHead] = []

    def submit(self, message: ToHead) -> None:
        """Hand a message to the loop; may be called from any thread."""
        self._inbox.put(message)

    def wait(self, timeout_s: float) -> None:
        try:
            message = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return
        if message is not None:
            self._peeked.append(message)

    def wake(self) -> None:
        self._inbox.put(None)

    def receive(self) -> list[tuple[bytes, ToHead]]:
        messages, self._peeked = self._peeked, []
        while not self._inbox.empty():
            if (message := self._inbox.get()) is not None:
                messages.append(message)
        return [(OWNER, message) for message in messages]

    def send(self, owner: bytes, message: FromHead) -> bool:  # noqa: ARG002
        self._deliver(message)
        return True

    def close(self) -> None:
        """Nothing to let go of."""
