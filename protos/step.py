"""Head <-> ranks: one `StepPlan` to every rank and one `StepResult` from rank 0 per step.

A rank keeps its sequences between steps, so that a plan carries differences only: new sequences whole, running ones
as the number of tokens to compute and the blocks they gained, ended ones by id.
"""

from __future__ import annotations

from msgspec import Struct

from .model import KVGroupSpec, ModelConfig
from .sampling import SamplingParams
from .sparsity import KVSparsity


class SequenceStart(Struct, kw_only=True, omit_defaults=True):
    """A sequence that a rank does not hold: newly admitted, or preempted before and back again."""

    seq_id: int
    seq_index: int
    """Place in its group; with the seed and the position it names the random number of a draw."""
    token_ids: list[int]
    """Prompt, then what was generated so far."""
    num_prompt_tokens: int
    num_computed_tokens: int = 0
    """Tokens whose keys and values are already in the blocks named by the first `SequenceStep`, those that compactions
    have dropped included."""
    num_dropped_tokens: int = 0
    """The blocks hold so many rows fewer than there are computed tokens: `Compaction`."""
    params: SamplingParams


class SequenceFork(Struct, kw_only=True, omit_defaults=True):
    """A sequence that begins as a copy of one that the ranks hold: its tokens, its block tables, how far it is computed
    and how many rows it has dropped. The parameters are the parent's. A copy of a suspended one is suspended."""

    seq_id: int
    parent_seq_id: int
    seq_index: int


class Compaction(Struct, kw_only=True):
    """Once the step is computed, every layer and KV head writes `num_kept` of the rows that it holds, its own choice in
    their order, into the new blocks. These become the sequence's whole block table, before siblings copy it.

    From then on it has more positions than rows: token p goes to row `p - dropped`, and is at position p for all that
    turns or learns positions.
    """

    num_kept: int
    new_block_ids: list[list[int]]
    """Per KV group. No move and no step of the plan reads them."""


class SequenceStep(Struct, kw_only=True, omit_defaults=True):
    """Compute the next `num_tokens` of a sequence. One that reaches the last known token samples the next one."""

    seq_id: int
    num_tokens: int = 1
    new_block_ids: list[list[int]] = []
    """Blocks appended to the block table of each KV group; empty: none in any group. 0 stands for a block that lies
    behind the window. Entries that fall behind it later are not taken back: what they name belongs to somebody else,
    and nobody may look at it."""
    copied_block_ids: list[int] = []
    """Per KV group the block that takes the place of the one that holds the first token computed, which other
    sequences still read; the plan's `copies` bring its contents (copy-on-write). Empty: it is written in place."""
    token_ids: list[int] = []
    """Appended to the sequence before it is computed: tokens of a beam, which the Head chooses."""
    compaction: Compaction | None = None


class BlockMoves(Struct, kw_only=True, omit_defaults=True):
    """Blocks of one KV group that a plan moves, kind after kind as the fields stand here; moves of one kind may run in
    any order. A block that a plan reads, or that a plan in flight names, is no destination, except blocks emptied by
    the plan's own earlier moves: device blocks by swap-outs that no copy reads, host blocks by disk stores that no
    swap-in reads.
    Device and host pools number their blocks apart, each from 1."""

    disk_drops: list[bytes] = []
    """Keys of files that are not wanted any more."""
    disk_stores: list[tuple[int, bytes]] = []
    """(host block, key)"""
    swap_outs: list[tuple[int, int]] = []
    """(device block, host block)"""
    disk_loads: list[tuple[bytes, int]] = []
    """(key, host block). Every rank answers a plan that has some."""
    swap_ins: list[tuple[int, int]] = []
    """(host block, device block)"""
    copies: list[tuple[int, int]] = []
    """(device block, device block)"""


class StepPlan(Struct, kw_only=True, omit_defaults=True, tag="plan"):
    """What the ranks of one group do next, in the order of the fields. `steps` may be empty where there are moves."""

    epoch: int
    step_id: int
    moves: list[BlockMoves] = []
    """Per KV group; empty: none in any group."""
    forks: list[SequenceFork] = []
    suspends: list[int] = []
    """With `KVSparsity.keeps_scores`, sequences that are swapped out: what a rank keeps beside their blocks, row by
    row, stays until they start again, or end."""
    ends: list[int] = []
    starts: list[SequenceStart] = []
    steps: list[SequenceStep] = []
    siblings: list[SequenceFork] = []
    """Forks of sequences of `steps` once those are computed and before they sample: each sibling samples its own next
    token from its parent's logits (parallel sampling)."""


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


class BeamCandidates(Struct, kw_only=True):
    """The likeliest next tokens of one beam, best first, `SamplingParams.num_beam_candidates` of them, or the
    whole vocabulary. The rank appends none: the Head chooses among the candidates of all beams of the group."""

    seq_id: int
    token_ids: list[int]
    logprobs: list[float]


class StepResult(Struct, kw_only=True, omit_defaults=True, tag="result"):
    """What rank 0 says of a step; any rank sends one with `error` when the step failed there. Of a plan with
    `disk_loads` every rank sends one, those of other ranks than 0 with `failed_loads` only."""

    epoch: int
    step_id: int
    rank: int = 0
    tokens: list[SampledToken] = []
    prompt_logprobs: list[PromptLogprobs] = []
    beams: list[BeamCandidates] = []
    failures: list[SequenceFailure] = []
    failed_loads: list[tuple[int, bytes]] = []
    """(KV group, key) of the plan's `disk_loads` whose file is missing, cut short or corrupt on this rank."""
    seconds: float = 0.0
    """Wall time that the rank spent on the step."""
    move_seconds: float = 0.0
    """Of these, on block moves."""
    error: str | None = None


FromRank = RankHello | StepResult


class RankConfig(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All that a rank is told when it starts."""

    model: ModelConfig
    dtype: str
    """`float32`, `bfloat16` or `float16`: of weights, activations and, unless `kv_cache_dtype` says otherwise, the KV
    cache."""
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
    quantization: str = "none"
    """`int8`, `int4`: of the weights of linear layers (the LM head has int8 in both), in the numbers of GGML."""
    kv_cache_dtype: str = "auto"
    """`auto`: as `dtype`; `int8`, `fp8`: quantized, with one scale per token and head; `int4`: keys with one per
    channel of a block and head, values per token and head, beside a residual of `dtype`."""
    kv_sparsity: KVSparsity | None = None
    kv_disk_path: str | None = None
    """Directory of the disk tier; None: there is none."""
    otlp_traces_endpoint: str | None = None
    """Where an actor of the rank sends its spans."""


class RankCosts(Struct, kw_only=True):
    """What moving and computing cost on this rank, measured once its weights are loaded."""

    copy_bytes_per_s: float
    """Of whole blocks from the device pool to the host pool and back."""
    prefill_tokens_per_s: float


class RankReady(Struct, kw_only=True, omit_defaults=True):
    """What a rank knows once its weights are loaded and before its KV pool is allocated."""

    rank: int
    kv_groups: list[KVGroupSpec]
    block_bytes: list[int]
    """Bytes of one block of each KV group on this rank."""
    available_bytes: int
    """Memory of its device that this rank may still take for its pools."""
    available_host_bytes: int
    """Main memory that it may still take; on a CPU, of the same."""
    kernels: str
    """Name of the kernel backend in use."""
    collectives: str = "none"
    """What carries tensors between the ranks: nccl, gloo, shared memory, threads."""
    node: str
    """Host that the rank runs on: ranks of one host share its memory."""
    pid: int
    costs: RankCosts
    stored_keys: list[list[bytes]] = []
    """Per KV group that the disk tier stores, which is any but a residual, the keys of the files that this rank could
    load, oldest first; empty: no disk tier."""
