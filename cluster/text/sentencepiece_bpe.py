"""SentencePiece's tokenizer (`tokenizer.ggml.model` = "llama"): BPE over characters, `▁` for a space, bytes as a last
resort. The file lists scores where the `tokenizers` library wants merges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...protos.errors import ModelLoadError
from .gguf_vocabulary import GgufVocabulary, TokenType

Json = dict[str, Any]

_SPACE = "▁"
_MERGEABLE = (TokenType.NORMAL, TokenType.USER_DEFINED)
_REPLACE_SPACE: Json = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
_DECODERS: list[Json] = [
    {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
_STRIP: Json = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


def sentencepiece_backend(vocabulary: GgufVocabulary, *, architecture: str, add_space_prefix: bool) -> Json:
    """The `tokenizer.json` of a SentencePiece BPE. Raises `ModelLoadError` when there are neither merges nor scores.

    Where the space before the first word comes from is not in the file, so it goes by architecture: Gemma has none;
    Phi-3 always adds one; the others do unless the text begins with one.
    """
    tokens = vocabulary.tokens
    normalizer: Json | None = None
    pre_tokenizer: Json | None = None
    decoders = [*_DECODERS, _STRIP]
    if architecture.startswith("gemma"):
        # Gemma's files spell runs of spaces with real spaces, and its scores do not follow its merge order.
        tokens = [_SPACE * len(token) if " " in token and not token.strip() else token for token in tokens]
        ranks: Sequence[float] = range(0, -len(tokens), -1)
        normalizer = _REPLACE_SPACE
        pre_tokenizer = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
        decoders = _DECODERS
    else:
        ranks = vocabulary.scores
        if architecture == "phi3":
            normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _SPACE}, _REPLACE_SPACE]}
        else:
            scheme = "first" if add_space_prefix else "never"
            pre_tokenizer = {"type": "Metaspace", "replacement": _SPACE, "prepend_scheme": scheme, "split": False}
            decoders = decoders if add_space_prefix else _DECODERS
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if not vocabulary.merges and not ranks:
        raise ModelLoadError(f"{vocabulary.path} has neither tokenizer.ggml.merges nor tokenizer.ggml.scores")
    unknown = vocabulary.unknown_token_id
    return {
        "version": "1.0",
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None if unknown is None else tokens[unknown],
            "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
            "ignore_merges": False, "vocab": vocab,
            "merges": vocabulary.merge_pairs() or _merges_from_ranks(tokens, vocab, ranks, vocabulary.types),
        },
    }


def _merges_from_ranks(
        tokens: list[str], vocab: dict[str, int], ranks: Sequence[float], types: list[int]) -> list[list[str]]:
    """Every way to make a token of two others, best rank first.

    Ties go by length, then to the split whose parts come first in the vocabulary, as in transformers' conversion."""
    candidates = []
    for token_id, token in enumerate(tokens):
        if types and types[token_id] not in _MERGEABLE:
            continue
        splits = [(token[:cut], token[cut:]) for cut in range(1, len(token))
                  if token[:cut] in vocab and token[cut:] in vocab]
        splits.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        candidates += [(ranks[token_id], len(left), len(right), left, right) for left, right in splits]
    candidates.sort(key=lambda item: item[:3], reverse=True)
    return [[left, right] for *_, left, right in candidates]
