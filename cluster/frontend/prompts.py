"""The forms that a prompt may take in the Python API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...protos.errors import InvalidRequestError
from ..text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, `{"prompt": text}` or `{"prompt_token_ids": [...]}`."""


def tokenize(prompt: Prompt, tokenizer: Tokenizer) -> tuple[str | None, list[int]]:
    """(text, token ids) of a prompt; the text is None where ids were given. Raises `InvalidRequestError`."""
    if isinstance(prompt, Mapping):
        if set(prompt) == {"prompt_token_ids"}:
            prompt = prompt["prompt_token_ids"]
        elif set(prompt) == {"prompt"}:
            prompt = prompt["prompt"]
        else:
            raise InvalidRequestError(
                f"a prompt given as a mapping has one key, prompt or prompt_token_ids; got {sorted(prompt)}",
                param="prompt")
    if isinstance(prompt, str):
        return prompt, tokenizer.encode(prompt)
    token_ids = [i for i in prompt if type(i) is int] if isinstance(prompt, Sequence) else None
    if token_ids is None or len(token_ids) != len(prompt):
        raise InvalidRequestError("a prompt is a string or a list of token ids", param="prompt")
    return None, token_ids


def is_single(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt rather than a list of them."""
    return isinstance(prompts, (str, Mapping)) or (
        isinstance(prompts, Sequence) and len(prompts) > 0 and isinstance(prompts[0], int))
