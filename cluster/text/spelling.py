"""How a vocabulary spells bytes: what each token contributes to the text, apart from its neighbours.

The `tokenizers` library decodes whole sequences only. Knowing the bytes of a single token makes streaming exact and
O(1) per token, and gives log-probability answers their `bytes`.
"""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer

from ...protos.errors import ModelLoadError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_EACH_BYTE = "kvarto-each-byte"

Leading = Literal["keep", "strip_one_space", "drop_markers"]


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(_EACH_BYTE, _replace_each_byte)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for every byte: itself where it is printable, else the next code point from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


@dataclass(frozen=True)
class Spelling:
    """Which of the two spellings a vocabulary uses, and its details."""

    byte_level: bool
    replacements: tuple[tuple[str, str], ...] = ()
    byte_fallback: bool = False
    leading: Leading = "keep"
    """What becomes of the space before the first word of a text."""
    marker: str = ""
    """The stand-in for a space that `drop_markers` speaks of."""

    @property
    def codec_errors(self) -> str:
        """Error handler of the UTF-8 decoder that makes of these bytes what `tokenizers` makes of them."""
        return "replace" if self.byte_level else _EACH_BYTE

    def token_bytes(self, token: str, *, first: bool = False) -> bytes:
        """The bytes that `token` stands for; `first`: no text comes before it."""
        if self.byte_level:
            if all(char in _ALPHABET for char in token):
                return bytes(_ALPHABET[char] for char in token)
            return token.encode()
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            data = bytes([int(match[1], 16)])
        else:
            if first and self.leading == "drop_markers":
                token = token.replace(self.marker, "")
            for old, new in self.replacements:
                token = token.replace(old, new)
            data = token.encode()
        return data.removeprefix(b" ") if first and self.leading == "strip_one_space" else data


def spelling_of(backend: Tokenizer, path: str) -> Spelling:
    """The spelling that the decoder of `backend` undoes. Raises `ModelLoadError` for decoders that have none per token,
    such as WordPiece's."""
    steps = _decoder_steps(backend)
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}:
        return Spelling(byte_level=True)
    if kinds and set(kinds) <= {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}:
        replacements: list[tuple[str, str]] = []
        leading: Leading = "keep"
        marker = ""
        for index, step in enumerate(steps):
            if step["type"] == "Replace" and "String" in step["pattern"]:
                replacements.append((step["pattern"]["String"], step["content"]))
            elif step["type"] == "Metaspace":
                marker = step["replacement"]
                replacements.append((marker, " "))
                leading = "keep" if step["prepend_scheme"] == "never" else "drop_markers"
            elif step["type"] == "Strip" and _strips_one_space_of_the_text(step, kinds[:index]):
                leading = "strip_one_space"
            elif step["type"] not in ("ByteFallback", "Fuse"):
                break
        else:
            return Spelling(byte_level=False, replacements=tuple(replacements), byte_fallback="ByteFallback" in kinds,
                            leading=leading, marker=marker)
    raise ModelLoadError(
        f"{path}: the tokenizer's decoder ({' + '.join(kinds) or 'none'}) is not supported; byte-level BPE and "
        "SentencePiece with byte fallback are")


def _strips_one_space_of_the_text(step: dict[str, Any], kinds_before: list[str]) -> bool:
    return (step["content"], step["start"], step["stop"]) == (" ", 1, 0) and "Fuse" in kinds_before


def _decoder_steps(backend: Tokenizer) -> list[dict[str, Any]]:
    if backend.decoder is None:
        return []
    decoder = json.loads(backend.decoder.__getstate__())
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]
