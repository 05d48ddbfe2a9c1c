"""Request bodies of `/v1/completions` and `/v1/chat/completions`. Unknown fields are refused by the decoder.

A field that is null means the same as one that is left out, as it does at OpenAI.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    """A last chunk with the usage and no choices; every other chunk has `usage: null`."""
    continuous_usage_stats: bool | None = None
    """The usage so far in every chunk (vLLM); counts only together with `include_usage`."""
    include_obfuscation: Literal[False] | None = None


class GenerateBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """What both endpoints share. Fields named as in `SamplingParams` are handed to it unchanged."""

    model: str | None = None
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: int | None = None
    add_special_tokens: bool | None = None
    priority: Int32 | None = None
    best_of: int | None = None
    beam_width: int | None = None
    use_beam_search: bool | None = None
    """vLLM's former name of a beam search: true means a `beam_width` of `best_of`, or of `n`."""
    length_penalty: float | None = None
    early_stopping: bool | Literal["never"] | None = None
    cache_salt: str | None = None
    """The prompt shares cached blocks only with prompts of the same salt."""

    user: str | None = None
    """A label for the client's own books, with no effect here; so are the next three."""
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class CompletionBody(GenerateBody, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/completions`."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None


class TextPart(Struct, forbid_unknown_fields=True):
    """One part of a message whose content is a list."""

    type: str
    text: str | None = None


class ChatMessage(Struct, kw_only=True, forbid_unknown_fields=True):
    """A message of a chat. An answer of this server, sent back as it came, is one."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: dict[str, Any] | None = None
    function_call: dict[str, Any] | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None


class ChatBody(GenerateBody, kw_only=True, forbid_unknown_fields=True):
    """Body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
