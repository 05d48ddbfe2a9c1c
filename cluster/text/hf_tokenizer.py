"""A tokenizer from a directory in Hugging Face format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from ...protos.errors import ModelLoadError
from .spec import TokenizerSpec


class _AddedToken(Struct):
    content: str


class _NamedTemplate(Struct):
    name: str
    template: str


_Token = str | _AddedToken


class _SpecialTokens(Struct):
    """What is wanted of `tokenizer_config.json` and of `special_tokens_map.json`, which says a part of the same."""

    bos_token: _Token | None = None
    eos_token: _Token | None = None
    unk_token: _Token | None = None
    sep_token: _Token | None = None
    pad_token: _Token | None = None
    cls_token: _Token | None = None
    mask_token: _Token | None = None
    additional_special_tokens: list[_Token] | None = None
    extra_special_tokens: list[_Token] | dict[str, _Token] | None = None
    chat_template: str | list[_NamedTemplate] | None = None

    def named(self) -> dict[str, str]:
        names = [name for name in self.__struct_fields__ if name.endswith("_token")]
        return {name: _content(token) for name in names if (token := getattr(self, name))}

    def extra(self) -> tuple[str, ...]:
        tokens = self.extra_special_tokens or self.additional_special_tokens or []
        return tuple(_content(token) for token in (tokens.values() if isinstance(tokens, dict) else tokens))


class _GenerationConfig(Struct):
    eos_token_id: int | list[int] | None = None


def read_hf_tokenizer(folder: str) -> TokenizerSpec:
    """The tokenizer of the model in `folder`. Raises `ModelLoadError` naming the file that is missing or damaged."""
    root = Path(folder)
    if not (root / "tokenizer.json").is_file():
        raise ModelLoadError(
            f"{root} has no tokenizer.json. Write one with transformers: "
            f"AutoTokenizer.from_pretrained('{root}').save_pretrained('{root}')")
    legacy = _read(root / "special_tokens_map.json", _SpecialTokens)
    config = _read(root / "tokenizer_config.json", _SpecialTokens)
    return TokenizerSpec(
        backend_json=_read_text(root / "tokenizer.json"),
        named_tokens=legacy.named() | config.named(),
        extra_special_tokens=config.extra() or legacy.extra(),
        eos_token_ids=_eos_token_ids(root),
        chat_templates=_chat_templates(root, config.chat_template))


def _eos_token_ids(root: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        ids = _read(root / name, _GenerationConfig).eos_token_id
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


def _chat_templates(root: Path, configured: str | list[_NamedTemplate] | None) -> dict[str, str]:
    """Files win over the key in `tokenizer_config.json`, as they do in transformers."""
    files = {path.stem: path for path in sorted((root / "additional_chat_templates").glob("*.jinja"))}
    if (root / "chat_template.jinja").is_file():
        files["default"] = root / "chat_template.jinja"
    if files:
        return {name: _read_text(path) for name, path in files.items()}
    if isinstance(configured, list):
        return {item.name: item.template for item in configured}
    return {"default": configured} if configured else {}


def _content(token: _Token) -> str:
    return token if isinstance(token, str) else token.content


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from None


S = TypeVar("S", _SpecialTokens, _GenerationConfig)


def _read(path: Path, kind: type[S]) -> S:
    if not path.is_file():
        return kind()
    try:
        # The standard library's parser, because configurations written by Python may hold NaN and Infinity.
        return msgspec.convert(json.loads(_read_text(path)), kind)
    except (ValueError, msgspec.ValidationError) as error:
        raise ModelLoadError(f"{path} is damaged: {error}") from None
