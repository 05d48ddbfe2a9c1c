"""Log probabilities in OpenAI's two shapes and in vLLM's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from ...protos.step import TokenLogprobs
from ..frontend_protocol import Tokenizer
from .replies import CompletionLogprobs, PromptLogprob, PromptLogprobs, TokenLogprob, TopLogprob

_FLOOR = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


def completion_logprobs(tokenizer: Tokenizer, positions: Sequence[TokenLogprobs], num_top: int,
                        offset: int) -> CompletionLogprobs:
    """Columns for a completion whose first token begins at character `offset` of the text."""
    columns = CompletionLogprobs([], [], [], [])
    for position in positions:
        text = tokenizer.token_text(position.token_id)
        top: dict[str, float] = {}
        candidates = zip(position.top_token_ids, position.top_logprobs, strict=True)
        for token_id, logprob in islice(candidates, num_top):
            # Two tokens may read alike (parts of characters): the likelier one, which comes first, is shown.
            top.setdefault(tokenizer.token_text(token_id), max(logprob, _FLOOR))
        top.setdefault(text, max(position.logprob, _FLOOR))
        columns.tokens.append(text)
        columns.token_logprobs.append(max(position.logprob, _FLOOR))
        columns.top_logprobs.append(top)
        columns.text_offset.append(offset)
        offset += len(text)
    return columns


def echo_logprobs(tokenizer: Tokenizer, token_ids: list[int], positions: Sequence[TokenLogprobs],
                  num_top: int) -> CompletionLogprobs:
    """Columns for an echoed prompt: nothing comes before its first token, which has no log probability."""
    first = tokenizer.token_text(token_ids[0])
    rest = completion_logprobs(tokenizer, positions, num_top, len(first))
    return CompletionLogprobs([first, *rest.tokens], [None, *rest.token_logprobs], [None, *rest.top_logprobs],
                              [0, *rest.text_offset])


def joined(left: CompletionLogprobs, right: CompletionLogprobs) -> CompletionLogprobs:
    """The columns of `left`, then those of `right`."""
    return CompletionLogprobs(left.tokens + right.tokens, left.token_logprobs + right.token_logprobs,
                              left.top_logprobs + right.top_logprobs, left.text_offset + right.text_offset)


def chat_logprobs(tokenizer: Tokenizer, positions: Sequence[TokenLogprobs], num_top: int) -> list[TokenLogprob]:
    """Rows for a chat answer."""
    rows = []
    for position in positions:
        candidates = zip(position.top_token_ids, position.top_logprobs, strict=True)
        rows.append(TokenLogprob(
            tokenizer.token_text(position.token_id), max(position.logprob, _FLOOR),
            list(tokenizer.token_bytes(position.token_id)),
            [TopLogprob(tokenizer.token_text(token_id), max(logprob, _FLOOR), list(tokenizer.token_bytes(token_id)))
             for token_id, logprob in islice(candidates, num_top)]))
    return rows


def prompt_logprobs(tokenizer: Tokenizer, positions: Sequence[TokenLogprobs], num_top: int) -> PromptLogprobs:
    """vLLM's form: by position, a map from token id; the first position has none."""
    result: PromptLogprobs = [None]
    for position in positions:
        candidates = zip(position.top_token_ids, position.top_logprobs, strict=True)
        entry = {token_id: PromptLogprob(max(logprob, _FLOOR), rank, tokenizer.token_text(token_id))
                 for rank, (token_id, logprob) in enumerate(islice(candidates, num_top), start=1)}
        entry.setdefault(position.token_id, PromptLogprob(
            max(position.logprob, _FLOOR), position.rank, tokenizer.token_text(position.token_id)))
        result.append(entry)
    return result
