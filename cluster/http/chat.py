"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from uuid import uuid4

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from ...protos.step import TokenLogprobs
from ..frontend_protocol import Frontend
from ..outputs import StreamChunk
from .answer import Style, answer
from .decode import decode_body
from .logprobs import chat_logprobs, prompt_logprobs
from .models import check_model
from .progress import Choice
from .prompts import chat_prompt, message_dicts
from .replies import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    Usage,
)
from .sampling import chat_sampling
from .schemas import ChatBody
from .streams import Job

_decoder = msgspec.json.Decoder(ChatBody)


async def chat(request: Request, frontend: Frontend) -> Response:
    """Answer one chat request."""
    body = decode_body(await request.body(), _decoder)
    model = check_model(body.model, frontend.config)
    params = chat_sampling(body, frontend.default_sampling)
    prompt = await chat_prompt(
        message_dicts(body.messages), frontend.tokenizer, add_generation_prompt=body.add_generation_prompt is not False,
        add_special_tokens=bool(body.add_special_tokens), template_kwargs=body.chat_template_kwargs)
    job = Job(f"chatcmpl-{uuid4().hex}", [prompt], params, body.priority or 0, body.cache_salt or "")
    return await answer(request, frontend, job, _ChatStyle(job, body, frontend, model), body)


class _ChatStyle(Style[ChatChunkChoice]):
    def __init__(self, job: Job, body: ChatBody, frontend: Frontend, model: str) -> None:
        self._id, self._model, self._created = job.request_id, model, int(time.time())
        self._tokenizer = frontend.tokenizer
        self._num_top = (body.top_logprobs or 0) if body.logprobs else None
        self._num_prompt_top = body.prompt_logprobs

    def news(self, choice: Choice, chunk: StreamChunk) -> Sequence[ChatChunkChoice]:
        news = []
        if not choice.started:
            choice.started = True
            news.append(ChatChunkChoice(index=choice.index, delta=ChatDelta("assistant", "")))
        if chunk.text or chunk.logprobs or chunk.finish_reason is not None:
            news.append(ChatChunkChoice(
                index=choice.index, delta=ChatDelta(content=chunk.text or None), finish_reason=chunk.finish_reason,
                logprobs=self._logprobs(chunk.logprobs),
                stop_reason=UNSET if chunk.stop_reason is None else chunk.stop_reason))
        return news

    def event(self, choices: list[ChatChunkChoice], usage: Usage | UnsetType | None) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def whole(self, choices: list[Choice], usage: Usage) -> ChatCompletion:
        of_prompt = UNSET if self._num_prompt_top is None else prompt_logprobs(
            self._tokenizer, choices[0].prompt.logprobs, self._num_prompt_top)
        return ChatCompletion(
            id=self._id, created=self._created, model=self._model, usage=usage, prompt_logprobs=of_prompt,
            choices=[ChatChoice(
                index=choice.index, message=AssistantMessage("".join(choice.text)),
                logprobs=self._logprobs(choice.logprobs), finish_reason=choice.finish_reason,
                stop_reason=UNSET if choice.stop_reason is None else choice.stop_reason) for choice in choices])

    def _logprobs(self, positions: Sequence[TokenLogprobs]) -> ChatLogprobs | None:
        if self._num_top is None:
            return None
        return ChatLogprobs(chat_logprobs(self._tokenizer, positions, self._num_top))
