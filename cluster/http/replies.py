"""Response bodies, with OpenAI's names. Encoded by msgspec: one is made for every chunk of every stream."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType


class PromptTokensDetails(Struct):
    """How many of the prompt's tokens were found in the prefix cache."""

    cached_tokens: int


class Usage(Struct):
    """Token counts of a whole HTTP request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(Struct):
    """vLLM's entry for one candidate at one position of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]


class CompletionLogprobs(Struct):
    """Columns over the tokens of one completion."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct, kw_only=True):
    """One completion, or the news of it in a stream."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | UnsetType = UNSET
    """vLLM's: the stop string or token id that ended it."""
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(Struct, kw_only=True):
    """Body of a whole completion and of its chunks."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class TopLogprob(Struct):
    """One candidate of a chat token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct):
    """A sampled chat token and its likeliest alternatives."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    """Rows over the tokens of one answer."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(Struct):
    """A whole answer."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class ChatDelta(Struct, omit_defaults=True):
    """News of an answer; the first one of a choice has the role."""

    role: str | None = None
    content: str | None = None


class ChatChoice(Struct, kw_only=True):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | UnsetType = UNSET


class ChatChunkChoice(Struct, kw_only=True):
    """News of one answer in a stream."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType = UNSET


class ChatCompletion(Struct, kw_only=True):
    """Body of a whole chat completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class ChatCompletionChunk(Struct, kw_only=True):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET


class ErrorDetail(Struct):
    """What went wrong, in OpenAI's words."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Struct):
    """OpenAI's error format: the body of an error response, and of an event that ends a stream early."""

    error: ErrorDetail


class Model(Struct, kw_only=True):
    """An entry of `/v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kvarto"
    root: str
    max_model_len: int


class ModelList(Struct):
    """Body of `/v1/models`."""

    data: list[Model]
    object: Literal["list"] = "list"
