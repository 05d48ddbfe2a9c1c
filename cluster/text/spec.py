"""What a tokenizer is made of, whichever kind of file it came from."""

from __future__ import annotations

from msgspec import Struct


class TokenizerSpec(Struct, frozen=True, kw_only=True):
    """Everything that `Tokenizer` needs, free of the file it was read from; what the tokenizer cache keeps."""

    backend_json: str
    """A `tokenizer.json` of the `tokenizers` library."""
    named_tokens: dict[str, str] = {}
    """`bos_token`, `eos_token`, ...: variables of chat templates, and special tokens even if `backend_json` is silent
    about it."""
    extra_special_tokens: tuple[str, ...] = ()
    """More tokens that are special even if `backend_json` is silent about it."""
    eos_token_ids: tuple[int, ...] = ()
    """Ends of generation that the model's configuration names, beside `eos_token`."""
    chat_templates: dict[str, str] = {}
    """Jinja sources by name; one that has no name of its own is `default`."""
