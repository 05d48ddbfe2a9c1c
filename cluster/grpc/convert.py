"""Protobuf messages to ours, and ours to protobuf."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ...protos import inference_pb2 as pb
from ...protos.errors import InvalidRequestError
from ...protos.sampling import SamplingParams
from ...protos.step import TokenLogprobs
from ..frontend.generation_defaults import with_defaults
from ..frontend_protocol import Tokenizer
from ..http.prompts import Prompt, chat_prompt, text_prompt
from ..outputs import StreamChunk

_ROLES = ("system", "user", "assistant")
_FINISH = {None: pb.FINISH_REASON_UNSPECIFIED, "stop": pb.FINISH_REASON_STOP, "length": pb.FINISH_REASON_LENGTH}


async def prompt_of(request: pb.GenerateRequest, tokenizer: Tokenizer) -> Prompt:
    """The prompt as token ids. Raises `InvalidRequestError` where it is missing or empty."""
    match request.WhichOneof("prompt"):
        case "text":
            if not request.text:
                raise InvalidRequestError("text is empty", param="text")
            return await text_prompt(request.text, tokenizer)
        case "token_ids":
            return Prompt(list(request.token_ids.ids))
        case "chat":
            return await chat_prompt(_messages(request.chat.messages), tokenizer)
        case _:
            raise InvalidRequestError("the request has no prompt: set text, token_ids or chat", param="prompt")


def _messages(messages: Iterable[pb.ChatMessage]) -> list[dict[str, Any]]:
    result = []
    for place, message in enumerate(messages):
        if message.role not in _ROLES:
            raise InvalidRequestError(
                f"chat.messages[{place}].role must be one of {', '.join(_ROLES)}, got '{message.role}'", param="chat")
        result.append({"role": message.role, "content": message.content})
    if not result:
        raise InvalidRequestError("chat has no messages", param="chat")
    return result


def params_of(request: pb.GenerateRequest, defaults: dict[str, Any]) -> SamplingParams:
    """Sampling parameters: what the request sets, else `defaults`, else those of `SamplingParams`."""
    values: dict[str, Any] = {"max_tokens": None} if request.WhichOneof("prompt") == "chat" else {}
    # The message names its fields as SamplingParams does, and lists only those that were set.
    for field, value in request.sampling.ListFields():
        values[field.name] = _CONVERTED[field.name](value) if field.name in _CONVERTED else value
    return SamplingParams(**with_defaults(values, defaults))


def _early_stopping(value: int) -> bool | str:
    if value not in _EARLY_STOPPING:
        raise InvalidRequestError(f"early_stopping has no value {value}", param="early_stopping")
    return _EARLY_STOPPING[value]


_EARLY_STOPPING: dict[int, bool | str] = {
    pb.EARLY_STOPPING_FALSE: False, pb.EARLY_STOPPING_TRUE: True, pb.EARLY_STOPPING_NEVER: "never"}
_CONVERTED: dict[str, Callable[[Any], Any]] = {
    "logit_bias": dict, "stop": list, "stop_token_ids": list, "early_stopping": _early_stopping}


def response_of(request_id: str, chunk: StreamChunk) -> pb.GenerateResponse:
    """One chunk as a message, without the usage."""
    response = pb.GenerateResponse(
        request_id=request_id, index=chunk.index, text=chunk.text, token_ids=chunk.token_ids,
        logprobs=_logprobs(chunk.logprobs), prompt_logprobs=_logprobs(chunk.prompt_logprobs or ()),
        finish_reason=_FINISH[chunk.finish_reason], cumulative_logprob=chunk.cumulative_logprob,
        beam_score=chunk.beam_score, num_cached_tokens=chunk.num_cached_tokens)
    if isinstance(chunk.stop_reason, str):
        response.stop_string = chunk.stop_reason
    elif chunk.stop_reason is not None:
        response.stop_token_id = chunk.stop_reason
    return response


def _logprobs(positions: Iterable[TokenLogprobs]) -> list[pb.TokenLogprobs]:
    return [pb.TokenLogprobs(
        token_id=position.token_id, logprob=position.logprob, rank=position.rank,
        top_token_ids=position.top_token_ids, top_logprobs=position.top_logprobs) for position in positions]
