"""Whether a request can be served at all: the same check at the frontend, before anything is sent, and at the Head."""

from __future__ import annotations

from ..protos.errors import InvalidRequestError, PromptTooLongError
from ..protos.request import EngineInfo, KVPool
from ..protos.sampling import SamplingParams
from .block_space.sparsity import Sparsity
from .block_space.windows import enough_blocks

MAX_CACHE_SALT = 1024
"""The most characters of a cache salt."""


def check(prompt_token_ids: list[int], params: SamplingParams, info: EngineInfo) -> int:
    """The request's `max_tokens`, with a default clamped to what `max_model_len` and the block space allow.

    Raises `InvalidRequestError` or `PromptTooLongError` (the allocation's answer is NEVER), which say what to change.
    """
    num_prompt = len(prompt_token_ids)
    if not num_prompt:
        raise InvalidRequestError("the prompt is empty: it needs at least one token", param="prompt")
    for name, ids in (("prompt", prompt_token_ids), ("logit_bias", params.logit_bias),
                      ("stop_token_ids", params.stop_token_ids)):
        if ids and not (min(ids) >= 0 and max(ids) < info.vocab_size):
            wrong = next(i for i in ids if not 0 <= i < info.vocab_size)
            raise InvalidRequestError(
                f"token id {wrong} is out of the vocabulary: it has {info.vocab_size} tokens", param=name)
    num_seqs, counted = params.num_sequences, _counted(params)
    if num_seqs > info.max_num_seqs:
        raise InvalidRequestError(
            f"{counted} ({num_seqs}) is above max_num_seqs ({info.max_num_seqs})", param=counted)
    if params.beam_width is not None and num_seqs > info.vocab_size:
        raise InvalidRequestError(
            f"beam_width ({num_seqs}) is above the {info.vocab_size} tokens of the vocabulary", param=counted)
    if num_prompt >= info.max_model_len:
        raise PromptTooLongError(
            f"the prompt has {num_prompt} tokens; max_model_len is {info.max_model_len}, prompt and output together",
            param="prompt")
    fits = min(info.max_model_len, *(_longest(num_prompt, num_seqs, pool, info) for pool in info.kv_pools))
    if num_prompt >= fits:
        raise PromptTooLongError(
            f"{counted}={num_seqs} sequences of {num_prompt} prompt tokens can never fit the KV cache of "
            f"{info.kv_capacity_tokens} tokens: shorten the prompt or give the server more blocks", param="prompt")
    max_tokens = fits - num_prompt if params.max_tokens is None else params.max_tokens
    asked, name = max(max_tokens, params.min_tokens), "max_tokens" if params.max_tokens else "min_tokens"
    if num_prompt + asked > info.max_model_len:
        raise PromptTooLongError(
            f"the prompt has {num_prompt} tokens and {name} is {asked}; max_model_len is {info.max_model_len}: ask for "
            f"at most {info.max_model_len - num_prompt}", param=name)
    if num_prompt + asked > fits:
        raise PromptTooLongError(
            f"{counted}={num_seqs} sequences of {num_prompt} + {asked} tokens can never fit the KV cache of "
            f"{info.kv_capacity_tokens} tokens: ask for at most {fits - num_prompt}", param=name)
    return max_tokens


def check_cache_salt(cache_salt: str) -> None:
    """Raises `InvalidRequestError` unless it is Unicode text of at most `MAX_CACHE_SALT` characters."""
    if not isinstance(cache_salt, str):
        raise InvalidRequestError(f"cache_salt must be a string, got {cache_salt!r}", param="cache_salt")
    if len(cache_salt) > MAX_CACHE_SALT:
        raise InvalidRequestError(
            f"cache_salt has {len(cache_salt)} characters; at most {MAX_CACHE_SALT} are allowed", param="cache_salt")
    try:
        cache_salt.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(
            "cache_salt is not Unicode text: it has a lone surrogate", param="cache_salt") from None


def _longest(num_prompt: int, num_seqs: int, pool: KVPool, info: EngineInfo) -> int:
    """Tokens of each sequence, prompt included, for which a pool has blocks."""
    enough = enough_blocks(pool, info.block_size, num_seqs, info.max_num_batched_tokens)
    if enough is not None and pool.num_blocks >= enough:
        return info.max_model_len
    # The sequences share the full blocks of the prompt; of the rest each takes the same whole number of blocks. Beside
    # a window they may not find those of the prompt when they are computed again: the first has gone past what they
    # see.
    shared = 0 if any(each.window is not None for each in info.kv_pools) else num_prompt // info.block_size
    fits = (shared + (pool.num_blocks - shared) // num_seqs) * info.block_size
    if info.kv_sparsity is None:
        return fits
    return Sparsity(info.kv_sparsity, info.block_size).longest(
        num_prompt, num_seqs, pool.num_blocks, fits, info.max_model_len)


def _counted(params: SamplingParams) -> str:
    """The parameter that `params.num_sequences` comes from."""
    if params.beam_width is not None:
        return "beam_width"
    return "n" if params.best_of is None else "best_of"
