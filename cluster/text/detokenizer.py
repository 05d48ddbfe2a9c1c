"""Token ids to text as they come, one sequence at a time.

Not built on `tokenizers.decoders.DecodeStream`: that one raises on SentencePiece byte tokens that are not UTF-8, holds
a genuine U+FFFD back for ever, and has no end at which to give out what it holds.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from .tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Streams the text of one generated sequence; O(1) per token, whatever came before.

    The text given out is `decode(prompt + output)` less `decode(prompt)`. Two things differ, both where the model emits
    bytes that are not UTF-8: a character begun in the prompt is not completed; and in a run of SentencePiece byte
    tokens valid characters stay, where `decode` replaces every byte of a run that is not valid as a whole. Text that
    has left already could not follow that.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer.codec_errors)
        self._at_start = not any(
            token_id not in self._skipped and tokenizer.token_bytes(token_id) for token_id in prompt_token_ids)

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that `token_ids` add. Bytes of a character that is not complete are held back (at most three)."""
        return self._utf8.decode(b"".join(
            self._next_bytes(token_id) for token_id in token_ids if token_id not in self._skipped))

    def flush(self) -> str:
        """At the end: replacement characters for what was held back and can never be completed, else nothing."""
        return self._utf8.decode(b"", final=True)

    def _next_bytes(self, token_id: int) -> bytes:
        if not self._at_start:
            return self._tokenizer.token_bytes(token_id)
        self._at_start = not self._tokenizer.token_bytes(token_id)
        return self._tokenizer.token_bytes(token_id, first=True)
