"""What users send as a prompt to token ids."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from msgspec import to_builtins

from ...protos.errors import InvalidRequestError, UnprocessableError
from ..frontend_protocol import Tokenizer
from .schemas import ChatMessage, CompletionBody

_RESERVED = frozenset({"self", "messages", "tools", "add_generation_prompt", "tokenize", "chat_template"})
"""Not to be set through `chat_template_kwargs`: a client's own template would be code that runs in the server."""
_LONG_CHARS = 16384
"""A prompt of this many characters takes a few milliseconds to tokenize."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request."""

    token_ids: list[int]
    text: str | None = None
    """As the user wrote it; None where token ids were sent."""


async def completion_prompts(body: CompletionBody, tokenizer: Tokenizer) -> list[Prompt]:
    """The prompts of a completion request, tokenized."""
    given = body.prompt
    if isinstance(given, str):
        items: list[str | list[int]] = [given]
    elif all(isinstance(item, int) for item in given):
        items = [[item for item in given if isinstance(item, int)]]
    elif all(isinstance(item, str) for item in given) or all(isinstance(item, list) for item in given):
        items = [item for item in given if not isinstance(item, int)]
    else:
        raise UnprocessableError(
            "prompt: a list holds strings, token ids or lists of token ids, not a mixture", param="prompt")
    special = body.add_special_tokens is not False
    prompts = []
    for place, item in enumerate(items):
        # Looked at before tokenizing: with a BOS even an empty text has a token.
        if not item:
            raise InvalidRequestError(
                f"prompt[{place}] is empty" if len(items) > 1 else "the prompt is empty", param="prompt")
        if isinstance(item, str):
            prompts.append(await text_prompt(item, tokenizer, add_special_tokens=special))
        else:
            prompts.append(Prompt(item))
    return prompts


async def text_prompt(text: str, tokenizer: Tokenizer, *, add_special_tokens: bool = True) -> Prompt:
    """`text`, tokenized. A long one is tokenized in a thread, so that other clients' streams go on meanwhile."""
    if len(text) <= _LONG_CHARS:
        return Prompt(tokenizer.encode(text, add_special_tokens=add_special_tokens), text)
    return Prompt(await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens), text)


def message_dicts(messages: list[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as `apply_chat_template` takes them. Raises `InvalidRequestError` for what no template here can show."""
    if not messages:
        raise InvalidRequestError("messages is empty", param="messages")
    return [_message_dict(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _message_dict(message: ChatMessage, where: str) -> dict[str, Any]:
    for field in ("tool_calls", "tool_call_id", "function_call", "audio"):
        if getattr(message, field):
            raise InvalidRequestError(f"{where}.{field} is not supported by this server", param=f"{where}.{field}")
    if message.role == "tool":
        raise InvalidRequestError(f"{where}: the role 'tool' is not supported by this server", param=f"{where}.role")
    if message.content is None:
        raise InvalidRequestError(f"{where}.content is missing", param=f"{where}.content")
    # `developer` is OpenAI's later name of `system`; templates know only the earlier one.
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": to_builtins(message.content), "name": message.name}


async def chat_prompt(messages: list[dict[str, Any]], tokenizer: Tokenizer, *, add_generation_prompt: bool = True,
                      add_special_tokens: bool = False, template_kwargs: dict[str, Any] | None = None) -> Prompt:
    """Messages through the model's chat template. Special tokens come from the template unless asked for."""
    if not tokenizer.has_chat_template:
        raise InvalidRequestError("this model has no chat template: use completions instead", param="messages")
    kwargs = template_kwargs or {}
    if reserved := sorted(_RESERVED & kwargs.keys()):
        raise InvalidRequestError(
            f"chat_template_kwargs must not set {', '.join(reserved)}", param="chat_template_kwargs")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, **kwargs)
    return await text_prompt(text, tokenizer, add_special_tokens=add_special_tokens)
