"""Whether a request can be served at all: the same check at the frontend, before anything is sent, and at the Head."""

from __future__ import annotations

from ..protos.errors import InvalidRequestError, PromptTooLongError
from ..protos.request import EngineInfo
from ..protos.sampling import SamplingParams


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
    if params.n > info.max_num_seqs:
        raise InvalidRequestError(f"n ({params.n}) is above max_num_seqs ({info.max_num_seqs})", param="n")
    if num_prompt >= info.max_model_len:
        raise PromptTooLongError(
            f"the prompt has {num_prompt} tokens; max_model_len is {info.max_model_len}, prompt and output together",
            param="prompt")
    # Each of the n sequences takes whole blocks, so that the share of one is a whole number of them.
    fits = min(info.max_model_len, info.num_blocks // params.n * info.block_size)
    if num_prompt >= fits:
        raise PromptTooLongError(
            f"n={params.n} sequences of {num_prompt} prompt tokens can never fit the KV cache of "
            f"{info.kv_capacity_tokens} tokens: shorten the prompt or give the server more blocks", param="prompt")
    max_tokens = fits - num_prompt if params.max_tokens is None else params.max_tokens
    asked, name = max(max_tokens, params.min_tokens), "max_tokens" if params.max_tokens else "min_tokens"
    if num_prompt + asked > info.max_model_len:
        raise PromptTooLongError(
            f"the prompt has {num_prompt} tokens and {name} is {asked}; max_model_len is {info.max_model_len}: ask for "
            f"at most {info.max_model_len - num_prompt}", param=name)
    if num_prompt + asked > fits:
        raise PromptTooLongError(
            f"n={params.n} sequences of {num_prompt} + {asked} tokens can never fit the KV cache of "
            f"{info.kv_capacity_tokens} tokens: ask for at most {fits - num_prompt}", param=name)
    return max_tokens
