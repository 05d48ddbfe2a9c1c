"""The scheduler's view of a request: a group of sequences that share a prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ...protos.request import AddRequest
from ...protos.step import BeamCandidates, TokenLogprobs
from ..block_space import SequenceBlocks
from .beam_search import BeamSearch


class Status(Enum):
    WAITING = "waiting"
    LOADING = "loading"
    """Waiting for cached blocks to be read from disk."""
    SWAPPED = "swapped"
    """Waiting with its blocks in host memory."""
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
    blocks: SequenceBlocks
    num_computed_tokens: int = 0
    """Tokens whose K and V are valid once every plan in flight has run."""
    num_pending_tokens: int = 0
    """Tokens sampled by plans in flight: they exist, but their values are not known here yet."""
    last_step_id: int = -1
    """The last plan that names this sequence."""
    on_ranks: bool = False
    is_suspended: bool = False
    """It is swapped out, and the ranks keep something of it beside its blocks."""
    finished: bool = False
    unsent_token_ids: list[int] = field(default_factory=list)
    """Chosen by the Head (beam search) and not yet known to the ranks that hold the sequence."""
    sampling_step_id: int = -1
    """Of a beam: the plan whose candidates it waits for; -1: none."""
    candidates: BeamCandidates | None = None
    """Of a beam: its continuations, until those of all beams are there."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        """0 where it waits for a result; a sequence that the plans in flight bring to its last token wants none."""
        num_tokens = len(self.token_ids) + self.num_pending_tokens
        if num_tokens - self.num_prompt_tokens >= self.group.max_tokens:
            return 0
        return num_tokens - self.num_computed_tokens

    @property
    def has_begun(self) -> bool:
        """Whether it holds blocks."""
        return self.blocks.capacity > 0


@dataclass(slots=True, eq=False)
class SequenceGroup:
    """One request in the scheduler. `serial` orders arrivals; `owner` is whoever gets its deltas."""

    request: AddRequest
    owner: bytes
    serial: int
    max_tokens: int
    key: tuple[int, int]
    """(priority, serial), its place in every queue: smaller goes first and is preempted last."""
    live: list[Sequence] = field(default_factory=list)
    """Sequences that have not ended, in the order of their indices; of a beam search, in that of their beams."""
    is_forked: bool = True
    """False while only the first of several sequences exists for the ranks: the others share its prompt."""
    beam_search: BeamSearch | None = None
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    """As far as they are known and not delivered; the first token of the group brings them."""
    num_cached_tokens: int = -1
    """Prompt tokens found in the prefix cache when it first began; -1: it has not begun."""
    swapped_step_id: int = -1
    """The plan that swapped it out last."""
    has_loaded: bool = False
    """Whether blocks were read from disk for it."""
    status: Status = Status.WAITING
    arrived_s: float = 0.0
    last_token_s: dict[int, float] = field(default_factory=dict)
    """When each sequence, by index, had its last token; for the metrics."""

    @property
    def num_seats(self) -> int:
        """Most sequences that it can come to have from now on."""
        return self.request.params.num_sequences if self.beam_search else len(self.live)

    @property
    def has_dropped(self) -> bool:
        """Whether a sequence of it holds fewer rows than it has computed tokens."""
        return any(sequence.blocks.num_dropped for sequence in self.live)

    @property
    def num_computed_tokens(self) -> int:
        return sum(sequence.num_computed_tokens for sequence in self.live)
