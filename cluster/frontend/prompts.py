"""The forms that a prompt may take in the Python API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...protos.errors import InvalidRequestError
from ..text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, `{"prompt": text}` or `{"prompt_token_ids": [...]}`; a mapping may have a `cache_salt` as well."""


class TokenizedPrompt(NamedTuple):
    """A prompt as the engine takes it."""

    text: str | None
    """None where ids were given."""
    token_ids: list[int]
    cache_salt: str


def tokenize(prompt: Prompt, tokenizer: Tokenizer, *, cache_salt: str = "") -> TokenizedPrompt:
    """`prompt` with its own cache salt, or with the one given beside it. Raises `InvalidRequestError`, also where both
    are given."""
    if isinstance(prompt, Mapping):
        prompt, own_salt = _unpacked(prompt)
        if own_salt and cache_salt:
            raise InvalidRequestError("cache_salt is given with the prompt and beside it", param="cache_salt")
        cache_salt = cache_salt or own_salt
    if isinstance(prompt, str):
        return TokenizedPrompt(prompt, tokenizer.encode(prompt), cache_salt)
    token_ids = [i for i in prompt if type(i) is int] if isinstance(prompt, Sequence) else None
    if token_ids is None or len(token_ids) != len(prompt):
        raise InvalidRequestError("a prompt is a string or a list of token ids", param="prompt")
    return TokenizedPrompt(None, token_ids, cache_salt)


def is_single(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt rather than a list of them."""
    return isinstance(prompts, (str, Mapping)) or (
        isinstance(prompts, Sequence) and len(prompts) > 0 and isinstance(prompts[0], int))


def _unpacked(prompt: Mapping[str, Any]) -> tuple[Any, str]:
    names = set(prompt) - {"cache_salt"}
    if names not in ({"prompt"}, {"prompt_token_ids"}):
        raise InvalidRequestError(
            "a prompt given as a mapping has one of prompt and prompt_token_ids, and may have a cache_salt; got "
            f"{sorted(prompt)}", param="prompt")
    salt = prompt.get("cache_salt")
    return prompt[names.pop()], "" if salt is None else salt
