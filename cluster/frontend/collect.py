"""From chunks to whole results."""

from __future__ import annotations

from ...protos.step import TokenLogprobs
from ..outputs import CompletionOutput, Logprob, RequestOutput, StreamChunk
from ..text.tokenizer import Tokenizer


def add_chunk(output: RequestOutput, chunk: StreamChunk, tokenizer: Tokenizer) -> None:
    """Append `chunk` to the completion that it belongs to."""
    completion = output.outputs[chunk.index]
    completion.text += chunk.text
    completion.token_ids.extend(chunk.token_ids)
    completion.finish_reason = chunk.finish_reason
    completion.stop_reason = chunk.stop_reason
    output.num_cached_tokens = max(output.num_cached_tokens, chunk.num_cached_tokens)
    completion.beam_score = chunk.beam_score
    if chunk.logprobs:
        completion.logprobs = (completion.logprobs or []) + [_by_token(entry, tokenizer) for entry in chunk.logprobs]
    if chunk.cumulative_logprob is not None:
        completion.cumulative_logprob = chunk.cumulative_logprob
    elif chunk.logprobs:
        completion.cumulative_logprob = (completion.cumulative_logprob or 0.0) + sum(e.logprob for e in chunk.logprobs)
    if chunk.prompt_logprobs and output.prompt_logprobs is None:
        output.prompt_logprobs = [None, *(_by_token(entry, tokenizer) for entry in chunk.prompt_logprobs)]


def empty_output(request_id: str, prompt: str | None, prompt_token_ids: list[int], n: int) -> RequestOutput:
    """The result of a request before its first chunk."""
    return RequestOutput(request_id, prompt, prompt_token_ids, [CompletionOutput(index) for index in range(n)])


def _by_token(entry: TokenLogprobs, tokenizer: Tokenizer) -> dict[int, Logprob]:
    found = {
        token_id: Logprob(logprob, rank, tokenizer.token_text(token_id))
        for rank, (token_id, logprob) in enumerate(zip(entry.top_token_ids, entry.top_logprobs, strict=True), start=1)}
    found[entry.token_id] = Logprob(entry.logprob, entry.rank, tokenizer.token_text(entry.token_id))
    return found
