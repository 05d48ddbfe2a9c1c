"""Head <-> ranks: one `StepPlan` to every rank and one `StepResult` from rank 0 per step.

A rank keeps its sequences between steps, so that a plan carries differences only: new sequences whole, running ones
as the number of tokens to compute and the blocks they gained, ended ones by id.
"""

from __future__ import annotations

from msgspec import Struct

from .model import KVGroupSpec, ModelConfig
from .sampling import SamplingParams


class SequenceStart(Struct, kw_only=True, omit_defaults=True):
    """A sequence that a rank does not hold: newly admitted, or preempted before and back again."""

    seq_id: int
    seq_index: int
    """Place in its group; with the seed and the position it names the random number of a draw."""
    token_ids: list[int]
    """Prompt, then what was generated so far."""
    num_prompt_tokens: int
    num_computed_tokens: int = 0
    """Tokens whose keys and values are already in the blocks named by the first `SequenceStep`."""
    params: SamplingParams


class SequenceStep(Struct, kw_only=True, omit_defaults=True):
    """Compute the next `num_tokens` of a sequence. One that reaches the last known token samples the next one."""

    seq_id: int
    num_tokens: int = 1
    new_block_ids: list[list[int]] = []
    """Blocks appended to the block table of each KV group; empty: none in any group."""


class StepPlan(Struct, kw_only=True, omit_defaults=True, tag="plan"):
    """What the ranks of one group do next. `ends` are forgotten first, then `starts` are taken, then `steps` run."""

    epoch: int
    step_id: int
    ends: list[int] = []
    starts: list[SequenceStart] = []
    steps: list[SequenceStep] = []


class Lease(Struct, kw_only=True, tag="lease"):
    """The Head lives. A rank that hears neither this nor a plan for its lease time ends itself."""

    epoch: int


class Shutdown(Struct, kw_only=True, tag="shutdown"):
    """End cleanly: no plan follows."""

    epoch: int


ToRank = StepPlan | Lease | Shutdown


class TokenLogprobs(Struct, kw_only=True):
    """Log probabilities at one position: of the token that stands there, its rank (1 = likeliest), and the top ones."""

    token_id: int
    logprob: float
    rank: int
    top_token_ids: list[int]
    top_logprobs: list[float]


class SampledToken(Struct, kw_only=True, omit_defaults=True):
    """The token that one sequence gained in a step."""

    seq_id: int
    token_id: int
    logprobs: TokenLogprobs | None = None


class PromptLogprobs(Struct, kw_only=True):
    """Of prompt positions `first ..`: position p's entry is about token p given those before it."""

    seq_id: int
    first: int
    positions: list[TokenLogprobs]


class SequenceFailure(Struct, kw_only=True):
    """A sequence that cannot go on although the step succeeded: its logits are not numbers."""

    seq_id: int
    message: str


class RankHello(Struct, kw_only=True, tag="hello"):
    """The first message of a rank, by which the Head learns its socket identity."""

    epoch: int
    rank: int


class StepResult(Struct, kw_only=True, omit_defaults=True, tag="result"):
    """What rank 0 says of a step; any rank sends one with `error` when the step failed there."""

    epoch: int
    step_id: int
    rank: int = 0
    tokens: list[SampledToken] = []
    prompt_logprobs: list[PromptLogprobs] = []
    failures: list[SequenceFailure] = []
    seconds: float = 0.0
    """Wall time that the rank spent on the step."""
    error: str | None = None


FromRank = RankHello | StepResult


class RankConfig(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that a rank is told when it starts."""

    model: ModelConfig
    dtype: str
    """`float32`, `bfloat16` or `float16`: of weights, activations and KV cache."""
    device: str
    tp_size: int
    rank: int
    epoch: int
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_threads: int
    step_timeout_s: float
    lease_s: float


class RankReady(Struct, kw_only=True, omit_defaults=True):
    """What a rank knows once its weights are loaded and before its KV pool is allocated."""

    rank: int
    kv_groups: list[KVGroupSpec]
    block_bytes: list[int]
    """Bytes of one block of each KV group on this rank."""
    available_bytes: int
    """Memory that this rank may still take for its pools."""
    kernels: str
    """Name of the kernel backend in use."""
    node: str
    """Host that the rank runs on: ranks of one host share its memory."""
    pid: int
