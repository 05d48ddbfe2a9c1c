"""The offline API that this ecosystem knows: whole lists of prompts in, whole results out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Self, TypeVar

from tqdm import tqdm

from ...protos.errors import InvalidRequestError
from ...protos.request import AddRequest
from ...protos.sampling import SamplingParams
from ..outputs import RequestOutput
from .async_llm import AsyncLLM
from .background_loop import BackgroundLoop
from .collect import add_chunk, empty_output
from .prompts import Prompt, is_single, tokenize

T = TypeVar("T")
Messages = Sequence[dict[str, Any]]


class LLM:
    """A model for use from synchronous code. Options are the fields of `EngineConfig`.

    Runs in this process for one rank and on Ray otherwise (`executor="ray" | "inline"` forces it); in this process
    it sets torch's thread count to `threads_per_rank`. Use as a context manager, or call `close`.
    """

    def __init__(self, model: str, **options: Any) -> None:
        """Raises `ConfigError` and its kin; nothing is left running then."""
        self._loop = BackgroundLoop()
        try:
            self._frontend = self._loop.run(AsyncLLM.start(model, **options))
        except BaseException:
            self._loop.close()
            raise

    def generate(
        self, prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *, use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """The completions of each prompt, in order. One `SamplingParams` for all, or one each; by default those that
        the model's makers recommend.

        Every request is checked before the first is submitted: `InvalidRequestError` names the first bad one.
        """
        many: list[Prompt] = [prompts] if is_single(prompts) else list(prompts)  # type: ignore[list-item, arg-type]
        default = SamplingParams(**self._frontend.default_sampling)
        params = _one_each(sampling_params or default, len(many), "sampling_params")
        priorities = _one_each(priority, len(many), "priority")
        return self._loop.run(self._generate(many, params, priorities, use_tqdm))

    def chat(
        self, messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, *, use_tqdm: bool = True,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """As `generate`, of one conversation or a list of them, put into text by the model's chat template."""
        many: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        tokenizer = self._frontend.tokenizer
        prompts: list[Prompt] = [
            tokenizer.encode(
                tokenizer.apply_chat_template(list(conversation), **(chat_template_kwargs or {})),
                add_special_tokens=False)
            for conversation in many]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def status(self) -> dict[str, Any]:
        """The engine's own accounting: requests, blocks, steps, preemptions."""
        return self._loop.run(self._frontend.status())

    def blocks(self) -> dict[str, Any]:
        """The block map: every block's state, and the block tables of every sequence."""
        return self._loop.run(self._frontend.blocks())

    @property
    def tokenizer(self) -> Any:
        return self._frontend.tokenizer

    def close(self) -> None:
        """End what was started. Idempotent."""
        if not self._loop.closed:
            self._loop.run(self._frontend.close())
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _generate(
        self, prompts: list[Prompt], params: list[SamplingParams], priorities: list[int], use_tqdm: bool,
    ) -> list[RequestOutput]:
        frontend = self._frontend
        requests: list[tuple[AddRequest, RequestOutput]] = []
        for place, (prompt, param, priority) in enumerate(zip(prompts, params, priorities, strict=True)):
            try:
                text, token_ids, cache_salt = tokenize(prompt, frontend.tokenizer)
                request = frontend.prepare(token_ids, param, priority=priority, cache_salt=cache_salt)
            except InvalidRequestError as error:
                if len(prompts) > 1:
                    raise type(error)(f"prompt {place}: {error.message}", param=error.param) from None
                raise
            requests.append((request, empty_output(request.request_id, text, token_ids, param.n)))
        with tqdm(total=len(requests), desc="requests", disable=not use_tqdm, dynamic_ncols=True) as progress:
            tasks = [asyncio.create_task(self._finish(*entry, progress)) for entry in requests]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return [output for _, output in requests]

    async def _finish(self, request: AddRequest, output: RequestOutput, progress: Any) -> None:
        state = self._frontend.submit(request)
        try:
            async for chunk in state:
                add_chunk(output, chunk, self._frontend.tokenizer)
        finally:
            await state.aclose()
        progress.update()


def _one_each(value: T | Sequence[T], count: int, name: str) -> list[T]:
    if not isinstance(value, (list, tuple)):
        return [value] * count  # type: ignore[list-item]
    if len(value) != count:
        raise InvalidRequestError(f"{len(value)} {name} for {count} prompts: give one, or one each", param=name)
    return list(value)
