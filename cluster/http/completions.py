"""`POST /v1/completions`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from uuid import uuid4

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from ..frontend_protocol import Frontend
from ..outputs import StreamChunk
from .answer import Style, answer
from .decode import decode_body
from .logprobs import completion_logprobs, echo_logprobs, joined, prompt_logprobs
from .models import check_model
from .progress import Choice
from .prompts import completion_prompts
from .replies import Completion, CompletionChoice, CompletionLogprobs, Usage
from .sampling import completion_sampling
from .schemas import CompletionBody
from .streams import Job

_decoder = msgspec.json.Decoder(CompletionBody)


async def complete(request: Request, frontend: Frontend) -> Response:
    """Answer one completion request."""
    body = decode_body(await request.body(), _decoder)
    model = check_model(body.model, frontend.config)
    params = completion_sampling(body, frontend.default_sampling)
    prompts = await completion_prompts(body, frontend.tokenizer)
    job = Job(f"cmpl-{uuid4().hex}", prompts, params, body.priority or 0, body.cache_salt or "")
    return await answer(request, frontend, job, _CompletionStyle(job, body, frontend, model), body)


class _CompletionStyle(Style[CompletionChoice]):
    def __init__(self, job: Job, body: CompletionBody, frontend: Frontend, model: str) -> None:
        self._id, self._model, self._created = job.request_id, model, int(time.time())
        self._tokenizer = frontend.tokenizer
        self._echo = bool(body.echo)
        self._num_top = body.logprobs
        self._num_prompt_top = body.prompt_logprobs
        self._skip_special_tokens = job.params.skip_special_tokens

    def news(self, choice: Choice, chunk: StreamChunk) -> Sequence[CompletionChoice]:
        text = chunk.text
        if self._echo and not choice.started:
            text = self._prompt_text(choice) + text
        choice.started = True
        if not text and not chunk.logprobs and chunk.finish_reason is None:
            return ()
        logprobs = None
        if self._num_top is not None:
            logprobs = completion_logprobs(self._tokenizer, chunk.logprobs, self._num_top, choice.offset)
            choice.offset += sum(map(len, logprobs.tokens))
        return (CompletionChoice(
            index=choice.index, text=text, logprobs=logprobs, finish_reason=chunk.finish_reason,
            stop_reason=UNSET if chunk.stop_reason is None else chunk.stop_reason),)

    def event(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(id=self._id, created=self._created, model=self._model, choices=choices, usage=usage)

    def whole(self, choices: list[Choice], usage: Usage) -> Completion:
        return self.event([self._finished(choice) for choice in choices], usage)

    def _finished(self, choice: Choice) -> CompletionChoice:
        text = "".join(choice.text)
        if self._echo:
            text = self._prompt_text(choice) + text
        of_prompt = UNSET if self._num_prompt_top is None else prompt_logprobs(
            self._tokenizer, choice.prompt.logprobs, self._num_prompt_top)
        return CompletionChoice(
            index=choice.index, text=text, logprobs=self._logprobs(choice), finish_reason=choice.finish_reason,
            stop_reason=UNSET if choice.stop_reason is None else choice.stop_reason, prompt_logprobs=of_prompt)

    def _logprobs(self, choice: Choice) -> CompletionLogprobs | None:
        if self._num_top is None:
            return None
        if not self._echo:
            return completion_logprobs(self._tokenizer, choice.logprobs, self._num_top, 0)
        prompt = choice.prompt
        echo = echo_logprobs(self._tokenizer, prompt.prompt.token_ids, prompt.logprobs, self._num_top)
        end = echo.text_offset[-1] + len(echo.tokens[-1])
        return joined(echo, completion_logprobs(self._tokenizer, choice.logprobs, self._num_top, end))

    def _prompt_text(self, choice: Choice) -> str:
        prompt = choice.prompt.prompt
        if prompt.text is not None:
            return prompt.text
        return self._tokenizer.decode(prompt.token_ids, skip_special_tokens=self._skip_special_tokens)
