"""What the engine loop needs of the world: a way to its frontends and a way to the ranks of each worker group."""

from __future__ import annotations

from typing import Protocol

from ...protos.request import FromHead, ToHead
from ...protos.step import StepPlan, StepResult


class GroupFailedError(Exception):
    """A worker group cannot go on: a rank died, failed or went silent. Its requests end and it is rebuilt."""


class Transport(Protocol):
    """The loop's side of all frontends. Only the loop's thread calls it, `wake` excepted."""

    def wait(self, timeout_s: float) -> None:
        """Return when a request or a result may be there, when `wake` was called, or after `timeout_s`."""

    def wake(self) -> None:
        """Make a `wait` return; may be called from any thread."""

    def receive(self) -> list[tuple[bytes, ToHead]]:
        """All messages that have arrived, each with the identity of its frontend."""

    def send(self, owner: bytes, message: FromHead) -> bool:
        """False: that frontend is gone."""

    def close(self) -> None:
        """Let go of every socket. Nothing may be called afterwards."""


class WorkerGroupLink(Protocol):
    """The loop's side of the ranks of one worker group."""

    max_in_flight: int
    """Plans that may be sent before their results are back."""

    def send(self, plan: StepPlan) -> None:
        """Hand a plan to every rank. Raises `GroupFailedError` when a rank cannot be reached."""

    def receive(self) -> list[StepResult]:
        """All results that have arrived, in order. Raises `GroupFailedError` when a rank reports an error."""

    @property
    def connected(self) -> bool:
        """Whether every rank can be reached: no plan may be sent before."""

    @property
    def has_result(self) -> bool:
        """Whether `receive` would return something without waiting for a rank."""

    def renew_lease(self) -> None:
        """Tell the ranks that their Head lives."""

    def close(self) -> None:
        """Tell the ranks to end."""
