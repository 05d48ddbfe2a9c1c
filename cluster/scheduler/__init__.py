"""Iteration-level scheduling of one worker group: pure Python, no clock, no I/O."""

from .scheduler import Scheduler, SchedulerLimits
from .sequence import Sequence, SequenceGroup, Status

__all__ = ["Scheduler", "SchedulerLimits", "Sequence", "SequenceGroup", "Status"]
