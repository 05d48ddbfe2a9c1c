"""Who goes next and who is the victim: pure functions, so that a policy is read and tested without a scheduler."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from .sequence import SequenceGroup


def pick_victim(running: Seq[SequenceGroup]) -> SequenceGroup:
    """The group to preempt: lowest priority, then latest arrival. `running` is sorted by `key`."""
    return running[-1]


def outranks(newcomer: SequenceGroup, running: SequenceGroup) -> bool:
    """Whether a waiting group may take the place of a running one: only by priority, never by arrival."""
    return newcomer.request.priority < running.request.priority


def watermark_blocks(num_blocks: int, num_running: int) -> int:
    """Blocks that an admission leaves free, so that the running groups do not preempt it at once."""
    return num_blocks // 100 if num_running else 0
