"""Frontend <-> Head: requests in, token deltas out; one message per frontend per step."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from .sampling import SamplingParams
from .sparsity import KVSparsity
from .step import TokenLogprobs


class AddRequest(Struct, kw_only=True, omit_defaults=True, tag="add"):
    """One request. The frontend has tokenized it, checked it and given it a seed."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    """Lower goes first, as in vLLM."""
    cache_salt: str = ""
    """Prompts share cached blocks only with prompts of the same salt."""
    output_token_ids: list[list[int]] = []
    """What each sequence has produced already, when a request is handed over again after a recovery."""
    ended_indices: list[int] = []
    """Sequences that had their last token before it: nothing more is wanted of them."""


class CancelRequest(Struct, kw_only=True, omit_defaults=True, tag="cancel"):
    """Nobody waits for this request, or for one of its sequences, any more; deltas on their way are not wanted."""

    request_id: str
    seq_index: int | None = None
    """None: all of its sequences."""


class Query(Struct, kw_only=True, tag="query"):
    """Ask for `info`, `status`, `blocks` (the block map) or `metrics`, or `drain`: take no more requests, and say how
    many are left. Answered by a `Reply` with the same id."""

    query_id: int
    what: str


class Ping(Struct, kw_only=True, tag="ping"):
    """A frontend lives and asks whether the Head does: answered by a `Pong`."""


ToHead = AddRequest | CancelRequest | Query | Ping


class RequestError(Struct, kw_only=True, omit_defaults=True):
    """Why a request ended without a result; `name` is a class of `protos.errors`."""

    name: str
    message: str
    param: str | None = None


class Delta(Struct, kw_only=True, omit_defaults=True):
    """New tokens of one sequence. A delta with `finish_reason` is its last; one with `error` ends the request."""

    request_id: str
    seq_index: int = 0
    first: int = 0
    """Index of the first of `token_ids` among the sequence's output: a repeated delta is recognised and dropped."""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    prompt_logprobs: list[TokenLogprobs] = []
    """Of prompt positions 1.., sent once, with the first token."""
    finish_reason: str | None = None
    """`stop` (end-of-sequence or a stop token) or `length`."""
    stop_reason: int | None = None
    """The token of `stop_token_ids` that ended the sequence; None for end-of-sequence."""
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache; set on the first delta."""
    cumulative_logprob: float | None = None
    """Of a beam's only delta: the sum over its tokens."""
    beam_score: float | None = None
    """Of a beam's only delta: `cumulative_logprob / num_tokens ** length_penalty`."""
    error: RequestError | None = None


class DeltaBatch(Struct, kw_only=True, omit_defaults=True, tag="deltas"):
    """All news of one step for one frontend."""

    epoch: int
    step_id: int | None = None
    """None: the deltas are errors that no step brought about."""
    deltas: list[Delta] = []


class Reply(Struct, kw_only=True, tag="reply"):
    """The answer to a `Query`: the fields of `EngineInfo` or of a status, or `{"text": ...}` of the metrics page."""

    query_id: int
    body: dict[str, Any]


class Pong(Struct, kw_only=True, omit_defaults=True, tag="pong"):
    """The Head lives. `ready`: a request that came now would be served; if not, `reason` says why."""

    epoch: int
    ready: bool = True
    reason: str = ""


FromHead = DeltaBatch | Reply | Pong


class KVPool(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The device blocks of one KV group: what bounds the sequences that fit."""

    num_blocks: int
    window: int | None = None
    """As in `KVGroupSpec`: what lies behind it gives its blocks back."""
    num_sinks: int = 0
    residual: bool = False
    """As in `KVGroupSpec`: holds the blocks that are being filled, and no others."""


class EngineInfo(Struct, frozen=True, kw_only=True):
    """What a frontend must know to check a request before it is sent."""

    epoch: int
    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    kv_capacity_tokens: int
    """Tokens that the block space of one worker group holds."""
    block_size: int
    max_num_batched_tokens: int
    """Most tokens that one step computes."""
    kv_pools: list[KVPool]
    num_host_blocks: int
    """Blocks of the host pool, to which sequences are swapped out and cached blocks fall."""
    kernels: str
    collectives: str = "none"
    """What carries tensors between the ranks of a group."""
    dtype: str
    quantization: str = "none"
    """Of the weights of linear layers."""
    kv_cache_dtype: str
    """Of the KV cache: a dtype, or how it is quantized."""
    tp_size: int
    num_groups: int
    kv_sparsity: KVSparsity | None = None
