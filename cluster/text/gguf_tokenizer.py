"""A tokenizer from the metadata of a GGUF file, which holds its parts under llama.cpp's names."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from ...protos.errors import ModelLoadError
from .byte_level_bpe import adds_bos, byte_level_backend
from .gguf_metadata import Value, read_metadata
from .gguf_vocabulary import GgufVocabulary
from .sentencepiece_bpe import sentencepiece_backend
from .spec import TokenizerSpec

_NAMED_TOKENS = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "unk_token": "unknown_token_id",
                 "pad_token": "padding_token_id"}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_TEMPLATE = "tokenizer.chat_template"

T = TypeVar("T", int, str, bool)


def read_gguf_tokenizer(path: str) -> TokenizerSpec:
    """The tokenizer inside the `.gguf` file at `path`. Raises `ModelLoadError` that names the offending key."""
    keys = _Keys(path, read_metadata(path))
    vocabulary = keys.vocabulary()
    model = keys.required("tokenizer.ggml.model", str)
    if model == "gpt2":
        pre = keys.required("tokenizer.ggml.pre", str)
        backend = byte_level_backend(vocabulary, pre)
        add_bos = adds_bos(pre)
    elif model == "llama":
        backend = sentencepiece_backend(
            vocabulary, architecture=keys.required("general.architecture", str),
            add_space_prefix=keys.optional("tokenizer.ggml.add_space_prefix", bool, True))
        add_bos = True
    else:
        raise ModelLoadError(f"{path}: tokenizer.ggml.model is '{model}'; 'gpt2' and 'llama' are supported")
    backend["post_processor"] = _post_processor(
        before=keys.token_to_add("bos", default=add_bos), after=keys.token_to_add("eos", default=False),
        tokens=vocabulary.tokens)
    named = {name: vocabulary.tokens[token_id] for name, key in _NAMED_TOKENS.items()
             if (token_id := keys.token_id(key)) is not None}
    ends = (keys.token_id(key) for key in _ENDS)
    return TokenizerSpec(
        backend_json=json.dumps(backend, ensure_ascii=False),
        named_tokens=named,
        eos_token_ids=tuple(dict.fromkeys(token_id for token_id in ends if token_id is not None)),
        chat_templates=keys.chat_templates())


def _post_processor(*, before: int | None, after: int | None, tokens: list[str]) -> dict[str, Any]:
    def special(token_id: int | None, type_id: int) -> list[dict[str, Any]]:
        return [] if token_id is None else [{"SpecialToken": {"id": tokens[token_id], "type_id": type_id}}]

    def sequence(name: str, type_id: int) -> list[dict[str, Any]]:
        text = [{"Sequence": {"id": name, "type_id": type_id}}]
        return special(before, type_id) + text + special(after, type_id)

    return {
        "type": "TemplateProcessing", "single": sequence("A", 0), "pair": sequence("A", 0) + sequence("B", 1),
        "special_tokens": {tokens[token_id]: {"id": tokens[token_id], "ids": [token_id], "tokens": [tokens[token_id]]}
                           for token_id in (before, after) if token_id is not None}}


class _Keys:
    """Typed look-ups whose errors name the file and the key."""

    def __init__(self, path: str, metadata: dict[str, Value]) -> None:
        self.path = path
        self._metadata = metadata

    def optional(self, key: str, kind: type[T], default: T) -> T:
        value = self._metadata.get(key, default)
        if not isinstance(value, kind):
            raise ModelLoadError(f"{self.path}: {key} is a {type(value).__name__}, not a {kind.__name__}")
        return value

    def required(self, key: str, kind: type[T]) -> T:
        if key not in self._metadata:
            raise ModelLoadError(
                f"{self.path} has no {key}, without which its tokenizer cannot be rebuilt: use a file written by a "
                "newer convert_hf_to_gguf.py, or a directory in Hugging Face format")
        return self.optional(key, kind, kind())

    def array(self, key: str) -> list[Any]:
        value = self._metadata.get(key, [])
        if not isinstance(value, list):
            raise ModelLoadError(f"{self.path}: {key} is a {type(value).__name__}, not an array")
        return value

    def token_id(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}"
        if key not in self._metadata:
            return None
        token_id = self.optional(key, int, 0)
        if not 0 <= token_id < len(self.array("tokenizer.ggml.tokens")):
            raise ModelLoadError(f"{self.path}: {key} is {token_id}, which is not in the vocabulary")
        return token_id

    def token_to_add(self, name: str, *, default: bool) -> int | None:
        """The id of `bos` or `eos` if it is to be added to every text."""
        flag = f"tokenizer.ggml.add_{name}_token"
        token_id = self.token_id(f"{name}_token_id")
        if token_id is None and self.optional(flag, bool, False):
            raise ModelLoadError(f"{self.path}: {flag} is set, but there is no tokenizer.ggml.{name}_token_id")
        return token_id if self.optional(flag, bool, default) else None

    def vocabulary(self) -> GgufVocabulary:
        return GgufVocabulary(
            path=self.path, tokens=self.array("tokenizer.ggml.tokens"), types=self.array("tokenizer.ggml.token_type"),
            scores=self.array("tokenizer.ggml.scores"), merges=self.array("tokenizer.ggml.merges"),
            unknown_token_id=self.token_id("unknown_token_id"))

    def chat_templates(self) -> dict[str, str]:
        """`tokenizer.chat_template` is the default one; `tokenizer.chat_template.NAME` are others."""
        names = [key for key in self._metadata if key == _TEMPLATE or key.startswith(_TEMPLATE + ".")]
        return {key.removeprefix(_TEMPLATE).lstrip(".") or "default": self.required(key, str) for key in names}
