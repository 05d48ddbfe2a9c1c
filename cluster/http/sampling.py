"""Request fields to `SamplingParams`."""

from __future__ import annotations

from typing import Any

from ...protos.errors import InvalidRequestError
from ...protos.sampling import MAX_LOGPROBS, SamplingParams
from ..frontend.best_of import BestOf
from ..frontend.generation_defaults import with_defaults
from .schemas import ChatBody, CompletionBody, GenerateBody

_SHARED = frozenset(SamplingParams.__struct_fields__) & frozenset(GenerateBody.__struct_fields__)


def completion_sampling(body: CompletionBody, defaults: dict[str, Any]) -> SamplingParams:
    """Parameters of a completion. `echo` with `logprobs` needs those of the prompt as well."""
    params = _shared(body, defaults)
    if body.suffix:
        raise InvalidRequestError("suffix is not supported by this server", param="suffix")
    if body.logprobs is not None:
        params["logprobs"] = body.logprobs
        if body.echo:
            params["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
    if body.stream and params.get("prompt_logprobs") is not None:
        raise InvalidRequestError(
            "logprobs of the prompt (prompt_logprobs, or echo with logprobs) are not streamed: set stream=false",
            param="prompt_logprobs" if body.prompt_logprobs is not None else "echo")
    return _checked(body, params)


def chat_sampling(body: ChatBody, defaults: dict[str, Any]) -> SamplingParams:
    """Parameters of a chat completion; without `max_tokens` an answer may be as long as fits."""
    _refuse_tools(body)
    params = _shared(body, defaults)
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise InvalidRequestError(
            "max_tokens and max_completion_tokens mean the same: send one of them", param="max_completion_tokens")
    params["max_tokens"] = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs=true", param="top_logprobs")
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= MAX_LOGPROBS:
        raise InvalidRequestError(
            f"top_logprobs must be between 0 and {MAX_LOGPROBS}, got {body.top_logprobs}", param="top_logprobs")
    if body.logprobs:
        params["logprobs"] = body.top_logprobs or 0
    if body.stream and body.prompt_logprobs is not None:
        raise InvalidRequestError("prompt_logprobs are not streamed: set stream=false", param="prompt_logprobs")
    return _checked(body, params)


def _shared(body: GenerateBody, defaults: dict[str, Any]) -> dict[str, Any]:
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError("stream_options needs stream=true", param="stream_options")
    sent = {name: value for name in _SHARED if (value := getattr(body, name)) is not None}
    if body.use_beam_search:
        _name_beam_width(sent)
    return with_defaults(sent, defaults)


def _name_beam_width(sent: dict[str, Any]) -> None:
    """vLLM's former way to ask for a beam search: of `best_of` beams, the `n` best."""
    if "beam_width" in sent:
        raise InvalidRequestError("use_beam_search and beam_width mean the same: send one of them",
                                  param="use_beam_search")
    beam_width = sent.pop("best_of", sent.get("n", 1))
    if beam_width == 1:
        raise InvalidRequestError(
            "use_beam_search needs a best_of, or an n, above 1: the number of beams", param="use_beam_search")
    sent["beam_width"] = beam_width


def _checked(body: GenerateBody, values: dict[str, Any]) -> SamplingParams:
    params = SamplingParams(**values)
    if body.stream and BestOf.is_asked(params):
        raise InvalidRequestError(
            f"best_of ({params.best_of}) above n ({params.n}) is not streamed, since all completions must end before "
            "the best are known: set stream=false", param="best_of")
    return params


def _refuse_tools(body: ChatBody) -> None:
    """What asks for nothing (`tools: []`, `tool_choice: "none"`, plain text as the format) passes."""
    if body.tools:
        raise InvalidRequestError("tools are not supported by this server", param="tools")
    if body.tool_choice not in (None, "none", "auto"):
        raise InvalidRequestError("tool_choice is not supported by this server", param="tool_choice")
    if body.response_format not in (None, {"type": "text"}):
        raise InvalidRequestError(
            "response_format is not supported by this server, other than {\"type\": \"text\"}",
            param="response_format")
