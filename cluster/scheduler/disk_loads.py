"""Groups that wait while cached blocks are read from disk, and the answers of the ranks."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...protos.step import StepPlan, StepResult
from ..block_space import BlockSpace
from .queues import Queues
from .sequence import SequenceGroup, Status


@dataclass(slots=True)
class _Load:
    """Blocks that one plan reads, for one group or several that begin alike, and what is left to read."""

    groups: list[SequenceGroup]
    keys: list[bytes]
    rest: list[bytes]
    failed: set[bytes] = field(default_factory=set)
    ranks: set[int] = field(default_factory=set)


class DiskLoads:
    """A group is parked until every rank has answered for all of its blocks; what failed is computed instead."""

    def __init__(self, space: BlockSpace, queues: Queues, num_ranks: int) -> None:
        self._tiers = space.tiers
        self._queues = queues
        self._num_ranks = num_ranks
        self._drafted: list[_Load] = []
        self._in_flight: dict[int, list[_Load]] = {}

    @property
    def are_in_flight(self) -> bool:
        """Whether ranks owe an answer."""
        return bool(self._in_flight)

    def begin(self, group: SequenceGroup, keys: list[bytes], num_kept: int) -> bool:
        """Park a group if blocks of these keys, in a row, can be read for it or are being read for another, without
        pushing out the `num_kept` host blocks that it needs as well. Once: what is evicted again before the group
        starts is computed."""
        load = self._find(keys[0])
        if load is not None:
            load.groups.append(group)
        elif not group.has_loaded and (count := self._tiers.num_loadable(keys, num_kept)):
            group.has_loaded = True
            # More than the host can hold at once would push out what was read first.
            self._draft(_Load([group], [], keys[: self._tiers.num_host_blocks - num_kept]), count)
        else:
            return False
        self._queues.park(group)
        return True

    def sent(self, plan: StepPlan) -> None:
        """The plan with the loads that were begun is on its way."""
        if self._drafted:
            self._in_flight[plan.step_id], self._drafted = self._drafted, []

    def answered(self, result: StepResult) -> None:
        """One rank has answered."""
        loads = self._in_flight.get(result.step_id)
        if loads is None:
            return
        failed = {key for _, key in result.failed_loads}
        for load in loads:
            load.failed |= failed.intersection(load.keys)
            load.ranks.add(result.rank)
        if len(loads[0].ranks) < self._num_ranks:
            return
        del self._in_flight[result.step_id]
        for load in loads:
            self._finish(load)

    def _finish(self, load: _Load) -> None:
        self._tiers.loaded(load.keys, load.failed)
        load.groups = [group for group in load.groups if group.status is Status.LOADING]
        count = 0 if load.failed or not load.groups else self._tiers.num_loadable(load.rest)
        if count:
            self._draft(load, count)
            return
        for group in load.groups:
            self._queues.requeue(group, Status.WAITING)

    def _draft(self, load: _Load, count: int) -> None:
        """Have the plan being made read the next `count` blocks."""
        load.keys, load.rest = load.rest[:count], load.rest[count:]
        load.ranks = set()
        self._tiers.load(load.keys)
        self._drafted.append(load)

    def _find(self, key: bytes) -> _Load | None:
        if not self._tiers.is_loading(key):
            return None
        return next(load for load in [*self._drafted, *(one for loads in self._in_flight.values() for one in loads)]
                    if key in load.keys)
