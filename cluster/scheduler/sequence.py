"""A sequence (one run of tokens) and a sequence group (all sequences of one request)."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ...protos.request import AddRequest
from ...protos.step import TokenLogprobs


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens known to the Head, and how far the plans sent so far will have brought them."""

    seq_id: int
    index: int
    group: SequenceGroup
    token_ids: list[int]
    num_prompt_tokens: int
    num_computed_tokens: int = 0
    """Tokens whose K and V are valid once every plan in flight has run."""
    num_pending_tokens: int = 0
    """Tokens sampled by plans in flight: they exist, but their values are not known here yet."""
    last_step_id: int = -1
    """The last plan that names this sequence."""
    on_ranks: bool = False
    finished: bool = False
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        """Generated tokens, those in flight included."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def wants_tokens(self) -> bool:
        """False once the plans in flight bring it to its last token."""
        return not self.finished and self.num_output_tokens < self.group.max_tokens


@dataclass(slots=True, eq=False)
class SequenceGroup:
    """One request in the scheduler. `serial` orders arrivals; `owner` is whoever gets its deltas."""

    request: AddRequest
    owner: bytes
    serial: int
    max_tokens: int
    sequences: list[Sequence] = field(default_factory=list)
    status: Status = Status.WAITING
    arrived_s: float = 0.0
    last_token_s: dict[int, float] = field(default_factory=dict)
    """When each sequence, by index, had its last token; for the metrics."""

    @property
    def key(self) -> tuple[int, int]:
        """Place in every queue: smaller goes first and is preempted last."""
        return self.request.priority, self.serial

    @property
    def live(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences if not sequence.finished]
