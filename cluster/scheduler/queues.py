"""Where each group stands: waiting, running, or reading from disk."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort

from .sequence import SequenceGroup, Status


class Queues:
    """Every unfinished group, the running ones sorted by key, and the waiting ones as a heap."""

    def __init__(self) -> None:
        self.groups: dict[tuple[bytes, str], SequenceGroup] = {}
        self.running: list[SequenceGroup] = []
        self.num_seats = 0
        """Of the running groups."""
        self._waiting: list[tuple[tuple[int, int], SequenceGroup]] = []

    def add(self, group: SequenceGroup) -> None:
        self.groups[group.owner, group.request.request_id] = group
        heapq.heappush(self._waiting, (group.key, group))

    def next_waiting(self) -> SequenceGroup | None:
        """The group that is to start next; those that ended while they waited are forgotten."""
        while self._waiting:
            group = self._waiting[0][1]
            if group.status in (Status.WAITING, Status.SWAPPED):
                return group
            heapq.heappop(self._waiting)
        return None

    def start(self, group: SequenceGroup) -> None:
        """The group that `next_waiting` gave runs now."""
        heapq.heappop(self._waiting)
        group.status = Status.RUNNING
        insort(self.running, group, key=_key)
        self.num_seats += group.num_seats

    def park(self, group: SequenceGroup) -> None:
        """The group that `next_waiting` gave waits for the disk: others may pass it."""
        heapq.heappop(self._waiting)
        group.status = Status.LOADING

    def requeue(self, group: SequenceGroup, status: Status) -> None:
        """A running or parked group waits again, in its old place."""
        if group.status is Status.RUNNING:
            self._leave_running(group)
        group.status = status
        heapq.heappush(self._waiting, (group.key, group))

    def retire(self, group: SequenceGroup) -> None:
        """The group has ended."""
        if group.status is Status.RUNNING:
            self._leave_running(group)
        group.status = Status.FINISHED
        del self.groups[group.owner, group.request.request_id]

    def behind(self, group: SequenceGroup) -> list[SequenceGroup]:
        """Running groups that come after `group`, in order."""
        running = self.running
        if not running or running[-1].key <= group.key:
            return []
        return running[bisect_left(running, group.key, key=_key) + (group.status is Status.RUNNING):]

    def last_pinning(self, but: SequenceGroup) -> SequenceGroup | None:
        """Of the swapped groups other than `but` that hold device blocks, which others share, the last in line."""
        pinning = [group for _, group in self._waiting if group.status is Status.SWAPPED and group is not but
                   and any(sequence.blocks.holds_device_blocks for sequence in group.live)]
        return max(pinning, key=_key, default=None)

    def _leave_running(self, group: SequenceGroup) -> None:
        self.running.pop(bisect_left(self.running, group.key, key=_key))
        self.num_seats -= group.num_seats


def _key(group: SequenceGroup) -> tuple[int, int]:
    return group.key
