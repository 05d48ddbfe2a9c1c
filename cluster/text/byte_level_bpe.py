"""GPT-2's tokenizer: BPE over bytes that are spelled as printable characters (`tokenizer.ggml.model` = "gpt2").

The pre-tokenizers are those of the models' own `tokenizer.json`, under llama.cpp's names for them. A wrong one still
encodes, only differently from what the model was trained on; hence a name that is not in the table is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...protos.errors import ModelLoadError
from .gguf_vocabulary import GgufVocabulary

Json = dict[str, Any]

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def _byte_level(*, use_regex: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(regex: str) -> tuple[Json, ...]:
    split = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return split, _byte_level(use_regex=False)


@dataclass(frozen=True)
class _Style:
    pre_tokenizers: tuple[Json, ...]
    normalizer: Json | None = None
    ignore_merges: bool = False
    """A piece that is a token as a whole is taken whole, whatever the merges say."""
    add_bos: bool = False
    """What holds where the file has no `add_bos_token`."""


_GPT2 = _Style((_byte_level(use_regex=True),))
_SMOLLM = _Style(({"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)))
_LLAMA3 = _Style(_split(_LLAMA3_SPLIT), ignore_merges=True, add_bos=True)
_STYLES = {
    "gpt-2": _GPT2, "phi-2": _GPT2,
    "smollm": _SMOLLM, "starcoder": _SMOLLM,
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3, "falcon3": _LLAMA3,
    "qwen2": _Style(_split(_QWEN2_SPLIT), normalizer={"type": "NFC"}),
    "deepseek-r1-qwen": _Style(_split(_QWEN2_SPLIT)),
    "tekken": _Style(_split(_TEKKEN_SPLIT), ignore_merges=True, add_bos=True),
}


def adds_bos(pre: str) -> bool:
    """Whether models with this known pre-tokenizer get a BOS where their file does not say."""
    return _STYLES[pre].add_bos


def byte_level_backend(vocabulary: GgufVocabulary, pre: str) -> Json:
    """The `tokenizer.json` of a byte-level BPE. Raises `ModelLoadError` for a pre-tokenizer that is not known."""
    style = _STYLES.get(pre)
    if style is None:
        raise ModelLoadError(
            f"{vocabulary.path}: tokenizer.ggml.pre is '{pre}'; known are {', '.join(sorted(_STYLES))}. Use the "
            "model's directory in Hugging Face format, which states its own pre-tokenizer")
    return {
        "version": "1.0",
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": style.normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(style.pre_tokenizers)},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": style.ignore_merges,
            "vocab": {token: token_id for token_id, token in enumerate(vocabulary.tokens)},
            "merges": vocabulary.merge_pairs(),
        },
    }
