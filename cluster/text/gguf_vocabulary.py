"""The vocabulary arrays of a GGUF file, checked, and the parts of a `tokenizer.json` that come straight from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from ...protos.errors import ModelLoadError


class TokenType(IntEnum):
    """llama.cpp's `llama_token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class GgufVocabulary:
    """`tokenizer.ggml.tokens` and the arrays beside it. Raises `ModelLoadError` when they do not go together."""

    path: str
    tokens: list[str]
    types: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    unknown_token_id: int | None = None

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ModelLoadError(f"{self.path} has no tokenizer.ggml.tokens: it carries no tokenizer")
        for name, kind in (("tokens", str), ("merges", str), ("types", int), ("scores", float)):
            if not all(isinstance(item, kind) for item in getattr(self, name)):
                raise ModelLoadError(f"{self.path}: tokenizer.ggml.{name} holds values that are no {kind.__name__}")
        for name in ("types", "scores"):
            if getattr(self, name) and len(getattr(self, name)) != len(self.tokens):
                raise ModelLoadError(f"{self.path}: {len(self.tokens)} tokens but {len(getattr(self, name))} {name}")

    def added_tokens(self) -> list[dict[str, Any]]:
        """Tokens matched whole before anything else: control tokens, which are special, and user-defined ones."""
        return [
            {"id": token_id, "content": self.tokens[token_id], "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": kind == TokenType.CONTROL}
            for token_id, kind in enumerate(self.types) if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)]

    def merge_pairs(self) -> list[list[str]]:
        """`merges` as pairs, likeliest first. The file joins the two with a space; the left one may begin with one."""
        pairs = []
        for merge in self.merges:
            cut = merge.find(" ", 1)
            if cut < 0:
                raise ModelLoadError(f"{self.path}: tokenizer.ggml.merges holds {merge!r}, which is not a pair")
            pairs.append([merge[:cut], merge[cut + 1:]])
        return pairs
