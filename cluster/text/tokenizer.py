"""Text to tokens and back, for one model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from ...protos.errors import InvalidRequestError, ModelLoadError
from .chat_template import ChatTemplate
from .gguf_tokenizer import read_gguf_tokenizer
from .hf_tokenizer import read_hf_tokenizer
from .spec import TokenizerSpec
from .spelling import spelling_of
from .tokenizer_cache import cached


class Tokenizer:
    """The tokenizer of one model, with its chat template. Safe to use from several threads at once.

    `encode` releases the GIL, so that a long prompt encoded in a thread does not stall an event loop.
    """

    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    """Every token that ends generation: of the model's configuration, then the tokenizer's own."""

    def __init__(self, spec: TokenizerSpec, path: str) -> None:
        """`path` is where `spec` comes from, for messages. Raises `ModelLoadError` when `spec` cannot be used."""
        self._backend = _build_backend(spec, path)
        self._spelling = spelling_of(self._backend, path)
        self._bytes: dict[int, bytes] = {}
        self._template = ChatTemplate(spec.chat_templates, spec.named_tokens)
        self.special_token_ids = frozenset(
            token_id for token_id, token in self._backend.get_added_tokens_decoder().items() if token.special)
        ids = {name: self._id_of(spec, name, path) for name in ("bos_token", "eos_token")}
        self.bos_token_id = ids["bos_token"]
        ends = (*spec.eos_token_ids, ids["eos_token"])
        self.eos_token_ids = tuple(dict.fromkeys(token_id for token_id in ends if token_id is not None))

    @classmethod
    def load(cls, model_path: str) -> Tokenizer:
        """The tokenizer of the model at `model_path`: a directory in Hugging Face format or a `.gguf` file.

        Raises `ModelLoadError` when the files are missing, damaged or of a kind that is not supported."""
        if os.path.isdir(model_path):
            return cls(read_hf_tokenizer(model_path), model_path)
        return cls(cached(model_path, read_gguf_tokenizer), model_path)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. `add_special_tokens`: with what the model wants around every text, such as a BOS; not
        wanted after `apply_chat_template`, which writes it. Raises `InvalidRequestError` for lone surrogates."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the text is not valid Unicode: it holds a lone surrogate at character {error.start}") from None
        # Unlike `encode`, this one releases the GIL, and it leaves the character offsets out.
        return self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids that name no token give nothing."""
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int, *, first: bool = False) -> bytes:
        """The bytes that one token stands for, which need not be whole characters; none for an id without a token, as
        models have them that pad their vocabulary. `first`: no text comes before it, so that a SentencePiece space
        that only opens the text is left out."""
        if first:
            return self._spelling.token_bytes(self._backend.id_to_token(token_id) or "", first=True)
        data = self._bytes.get(token_id)
        if data is None:
            data = self._bytes[token_id] = self._spelling.token_bytes(self._backend.id_to_token(token_id) or "")
        return data

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, with U+FFFD for what is not UTF-8 on its own."""
        return self.token_bytes(token_id).decode(errors=self._spelling.codec_errors)

    @property
    def codec_errors(self) -> str:
        """The `errors` with which a UTF-8 decoder makes of `token_bytes` what `decode` gives."""
        return self._spelling.codec_errors

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest token id, added tokens included. The model's own is larger where it is padded."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def has_chat_template(self) -> bool:
        return self._template.exists

    def apply_chat_template(
            self, messages: Sequence[Mapping[str, object]], add_generation_prompt: bool = True,
            tools: Sequence[Mapping[str, object]] | None = None, **kwargs: object) -> str:
        """The prompt that the model's template makes of a conversation in OpenAI's format. `kwargs` are variables of
        the template. Encode the result with `add_special_tokens=False`.

        Raises `InvalidRequestError` when there is no template, or when it or the format refuses the messages."""
        return self._template.render(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=kwargs)

    def _id_of(self, spec: TokenizerSpec, name: str, path: str) -> int | None:
        token = spec.named_tokens.get(name)
        if token is None:
            return None
        token_id: int | None = self._backend.token_to_id(token)
        if token_id is None:
            raise ModelLoadError(f"{path}: {name} is '{token}', which is not in the vocabulary")
        return token_id


def _build_backend(spec: TokenizerSpec, path: str) -> Backend:
    try:
        backend = Backend.from_str(spec.backend_json)
    except Exception as error:  # the library raises nothing more specific
        raise ModelLoadError(f"{path}: the tokenizer cannot be built: {error}") from None
    # Both are left in many published files by a training run, and would cut or pad prompts.
    backend.no_truncation()
    backend.no_padding()
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    for name in (*spec.named_tokens.values(), *spec.extra_special_tokens):
        # Only what is in the vocabulary: the model has no embedding for anything else.
        if backend.token_to_id(name) is not None and not (name in known and known[name].special):
            token = known.get(name, AddedToken(name, normalized=False))
            token.special = True
            backend.add_special_tokens([token])
    return backend
