"""The asynchronous frontend: the one object that HTTP, gRPC, `LLM` and the command line stand on."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Self

import msgspec

from ...protos.config import EngineConfig, ServeConfig
from ...protos.endpoint import Endpoint
from ...protos.errors import InvalidRequestError, KvartoError, UnavailableError
from ...protos.request import AddRequest, CancelRequest, DeltaBatch, EngineInfo
from ...protos.sampling import SamplingParams
from ...protos.span_export import export_spans
from ...protos.spans import Span
from .. import admission
from ..frontend_protocol import Health
from ..outputs import RequestOutput
from ..text.tokenizer import Tokenizer
from .client import EngineClient, EngineConnection
from .collect import add_chunk, empty_output
from .generation_defaults import generation_defaults
from .prompts import Prompt, tokenize
from .request_state import RequestState

logger = logging.getLogger(__name__)


class AsyncLLM:
    """Owns its requests: it keeps prompt, parameters and every token received. Belongs to one event loop.

    Made by `AsyncLLM.start(...)` with the fields of `EngineConfig`, or by `connect` to a running application. `info` is
    what the engine said of itself; `default_sampling` are the recommendations of `generation_config.json`.
    """

    def __init__(
        self, config: ServeConfig, client: EngineClient, info: EngineInfo, text: tuple[Tokenizer, dict[str, Any]],
    ) -> None:
        self.config = config
        self.info = info
        self.tokenizer, self.default_sampling = text
        self._client = client
        client.on_deltas, client.on_lost = self._on_deltas, self._on_lost
        self._requests: dict[str, RequestState] = {}
        self._seeds = random.Random(config.seed)
        self._on_close: list[Callable[[], Awaitable[None]]] = []
        self._closed = False
        self._clamp_reported = False

    @classmethod
    async def start(cls, model: str, **options: Any) -> Self:
        """Load `model` with the options of `EngineConfig` and serve it: in this process for one rank, else on Ray.

        Raises `ConfigError` and its kin; nothing is left running then.
        """
        return await cls.from_config(ServeConfig.parse({"model": model, **options}))

    @classmethod
    async def from_config(cls, config: ServeConfig) -> Self:
        """As `start`, from a configuration that was read already."""
        return await (cls._start_on_ray(config) if config.on_ray else cls._start_inline(config))

    @classmethod
    async def _start_inline(cls, config: ServeConfig) -> Self:
        from .inline_connection import InlineConnection

        # Torch takes seconds to import, and the tokenizer needs none of it.
        text = asyncio.create_task(asyncio.to_thread(_load_text, config))
        client = EngineClient()
        return await cls._connected(config, client, InlineConnection.start(client, config), text)

    @classmethod
    async def _start_on_ray(cls, config: ServeConfig) -> Self:
        from ..application import PrivateApplication

        application = await PrivateApplication.start(config)
        try:
            self = await cls.connect(config, application.locate)
        except BaseException:
            await application.close()
            raise
        self._on_close.append(application.close)
        return self

    @classmethod
    async def connect(
        cls, config: ServeConfig, locate: Callable[[], Awaitable[Endpoint]], *, seed_salt: str | None = None,
    ) -> Self:
        """A frontend of a Head that runs already and is ready; `locate` finds its endpoint. Where several frontends
        serve the same users, a `seed_salt` of its own keeps each from drawing the others' seeds."""
        from .zmq_connection import ZmqConnection

        text = asyncio.create_task(asyncio.to_thread(_load_text, config))
        client = EngineClient()
        self = await cls._connected(config, client, ZmqConnection.start(client, locate), text)
        if seed_salt is not None:
            self._seeds = random.Random(f"{config.seed}/{seed_salt}")
        return self

    @classmethod
    async def _connected(
        cls, config: ServeConfig, client: EngineClient, connection: Awaitable[EngineConnection],
        text: asyncio.Task[tuple[Tokenizer, dict[str, Any]]],
    ) -> Self:
        """Nothing is left open when any of it fails."""
        async with AsyncExitStack() as undo:
            undo.push_async_callback(_end, text)
            client.connection = await connection
            undo.push_async_callback(client.connection.close)
            self = cls(config, client, await client.info(), await text)
            if config.otlp_traces_endpoint is not None:
                end_export = export_spans(config.otlp_traces_endpoint, "frontend")
                self._on_close.append(partial(asyncio.to_thread, end_export))
            undo.pop_all()
        return self

    def stream(
        self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None, priority: int = 0,
        cache_salt: str = "",
    ) -> RequestState:
        """Check and submit a request; returns its chunks as an async iterator with `aclose()`, which cancels. Prompts
        share cached blocks only with prompts of the same `cache_salt`.

        Raises `InvalidRequestError`, `PromptTooLongError` or `UnavailableError` at the call, before anything is taken.
        """
        _, token_ids, salt = tokenize(prompt, self.tokenizer, cache_salt=cache_salt)
        return self.submit(self.prepare(
            token_ids, params, request_id=request_id, priority=priority, cache_salt=salt))

    async def generate(
        self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None, priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """The request's result as it grows: each item is the whole so far, the last one is `finished`."""
        text, token_ids, salt = tokenize(prompt, self.tokenizer, cache_salt=cache_salt)
        request = self.prepare(token_ids, params, request_id=request_id, priority=priority, cache_salt=salt)
        output = empty_output(request.request_id, text, token_ids, params.n)
        state = self.submit(request)
        try:
            async for chunk in state:
                add_chunk(output, chunk, self.tokenizer)
                yield output
        finally:
            await state.aclose()

    def prepare(
        self, token_ids: list[int], params: SamplingParams, *, request_id: str | None = None, priority: int = 0,
        cache_salt: str = "",
    ) -> AddRequest:
        """Check a request and give it an id and, where it is to be sampled at random, a seed. Takes nothing."""
        admission.check_cache_salt(cache_salt)
        max_tokens = admission.check(token_ids, params, self.info)
        if params.max_tokens is None and len(token_ids) + max_tokens < self.info.max_model_len:
            self._report_clamp(max_tokens)
        changes: dict[str, Any] = {"max_tokens": max_tokens}
        if params.seed is None and not params.greedy and params.beam_width is None:
            changes["seed"] = self._seeds.getrandbits(63)
        return AddRequest(
            request_id=request_id or uuid.uuid4().hex, prompt_token_ids=token_ids,
            params=msgspec.structs.replace(params, **changes), priority=priority, cache_salt=cache_salt)

    def submit(self, request: AddRequest) -> RequestState:
        """Send what `prepare` made. Raises `UnavailableError` when there is nobody to send it to."""
        pong = self._client.last_pong
        if self._closed or (pong is not None and not pong.ready and not self._requests):
            raise UnavailableError(pong.reason if pong and not self._closed else "this AsyncLLM is closed")
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use", param="request_id")
        state = RequestState(request, self.tokenizer, cancel=self._cancel, forget=self._forget)
        self._client.connection.send(state.request)
        self._requests[request.request_id] = state
        return state

    async def status(self) -> dict[str, Any]:
        """The state of the whole application. Raises `UnavailableError`."""
        return await self._client.query("status") | {"info": msgspec.to_builtins(self.info)}

    async def blocks(self) -> dict[str, Any]:
        """The block map of every worker group (`block_space/block_map.py`). Raises `UnavailableError`."""
        return await self._client.query("blocks")

    async def metrics(self) -> str:
        """Prometheus' text format. Raises `UnavailableError`."""
        return str((await self._client.query("metrics"))["text"])

    async def drain(self) -> int:
        """Have the whole application take no more requests, for good; how many it has left. Raises
        `UnavailableError`."""
        return int((await self._client.query("drain"))["num_unfinished"])

    def health(self) -> Health:
        """As of the Head's last answer to a ping."""
        pong = self._client.last_pong
        if pong is None:
            return Health(live=True, ready=False, reason="the Head has not answered yet")
        return Health(live=not self._closed, ready=pong.ready and not self._closed, reason=pong.reason)

    async def close(self) -> None:
        """End every request with `UnavailableError` and let go of what was started. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._on_lost("the frontend was closed")
        await self._client.connection.close()
        for action in self._on_close:
            await action()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _on_deltas(self, batch: DeltaBatch) -> None:
        with Span("detokenize"):
            self._take_deltas(batch)

    def _take_deltas(self, batch: DeltaBatch) -> None:
        for delta in batch.deltas:
            if state := self._requests.get(delta.request_id):
                try:
                    state.take(delta)
                except Exception as error:
                    # A defect must cost one request, not the others of the batch or the connection.
                    logger.exception("request %s: defect", delta.request_id)
                    self._cancel(delta.request_id, None)
                    state.fail(KvartoError(f"{type(error).__name__}: {error}"))

    def _on_lost(self, reason: str) -> None:
        for state in list(self._requests.values()):
            state.fail(UnavailableError(reason))

    def _report_clamp(self, max_tokens: int) -> None:
        if not self._clamp_reported:
            self._clamp_reported = True
            logger.warning(
                "a request without max_tokens may generate %d here: the KV cache holds fewer than max_model_len "
                "tokens per sequence (said once)", max_tokens)

    def _cancel(self, request_id: str, seq_index: int | None) -> None:
        # A Head that is gone has forgotten the request already.
        with contextlib.suppress(UnavailableError):
            self._client.connection.send(CancelRequest(request_id=request_id, seq_index=seq_index))

    def _forget(self, request_id: str) -> None:
        self._requests.pop(request_id, None)


async def _end(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


def _load_text(config: EngineConfig) -> tuple[Tokenizer, dict[str, Any]]:
    from ..model_hub import resolve_model

    path = resolve_model(config.model)
    return Tokenizer.load(path), generation_defaults(path)
