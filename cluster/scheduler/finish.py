"""When a sequence has had its last token."""

from __future__ import annotations

from .sequence import Sequence


def finish_reason(sequence: Sequence, eos_token_ids: frozenset[int]) -> tuple[str | None, int | None]:
    """(`finish_reason`, `stop_reason`) after the last token of `sequence.token_ids` was sampled; (None, None): go on.

    Stop strings are the frontend's business: it cancels what it has seen enough of.
    """
    params = sequence.group.request.params
    token_id = sequence.token_ids[-1]
    num_output_tokens = len(sequence.token_ids) - sequence.num_prompt_tokens
    if num_output_tokens >= params.min_tokens:
        if token_id in params.stop_token_ids:
            return "stop", token_id
        if token_id in eos_token_ids and not params.ignore_eos:
            return "stop", None
    if num_output_tokens >= sequence.group.max_tokens:
        return "length", None
    return None, None
