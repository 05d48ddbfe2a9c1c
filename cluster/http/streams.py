"""The engine streams of one HTTP request, read as one and always ended with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from ...protos.errors import InvalidRequestError
from ...protos.sampling import SamplingParams
from ..admission import check
from ..frontend_protocol import ChunkStream, Frontend
from ..outputs import StreamChunk
from .prompts import Prompt

Batch = list[tuple[int, StreamChunk]]
"""Chunks that are there at once, each with the place of its prompt in the request."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one HTTP request asks the engine for."""

    request_id: str
    prompts: list[Prompt]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""


@asynccontextmanager
async def opened(frontend: Frontend, job: Job) -> AsyncIterator[AsyncIterator[Batch]]:
    """Check all prompts of `job`, then submit all. Leaving the context in any way cancels what still runs."""
    for place, prompt in enumerate(job.prompts):
        _check(frontend, job, place, prompt)
    async with AsyncExitStack() as stack:
        streams = []
        for place, prompt in enumerate(job.prompts):
            request_id = f"{job.request_id}-{place}" if len(job.prompts) > 1 else job.request_id
            stream = frontend.stream(
                prompt.token_ids, job.params, request_id=request_id, priority=job.priority, cache_salt=job.cache_salt)
            stack.push_async_callback(stream.aclose)
            streams.append(stream)
        batches = _single(streams[0]) if len(streams) == 1 else _merged(streams)
        stack.push_async_callback(batches.aclose)
        yield batches


def _check(frontend: Frontend, job: Job, place: int, prompt: Prompt) -> None:
    try:
        check(prompt.token_ids, job.params, frontend.info)
    except InvalidRequestError as error:
        if len(job.prompts) == 1:
            raise
        raise type(error)(f"prompt[{place}]: {error.message}", param=error.param) from None


async def _single(stream: ChunkStream) -> AsyncGenerator[Batch, None]:
    # Nearly all requests have one prompt: theirs need no task and no queue between engine and response.
    async for chunk in stream:
        yield [(0, chunk)]


async def _merged(streams: Sequence[ChunkStream]) -> AsyncGenerator[Batch, None]:
    arrived: asyncio.Queue[tuple[int, StreamChunk] | Exception | None] = asyncio.Queue()

    async def pump(place: int, stream: ChunkStream) -> None:
        try:
            async for chunk in stream:
                arrived.put_nowait((place, chunk))
        except Exception as error:
            arrived.put_nowait(error)
        else:
            arrived.put_nowait(None)

    pumps = [asyncio.create_task(pump(place, stream)) for place, stream in enumerate(streams)]
    try:
        num_open = len(pumps)
        while num_open:
            items = [await arrived.get()]
            while not arrived.empty():
                items.append(arrived.get_nowait())
            batch: Batch = []
            for item in items:
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    num_open -= 1
                else:
                    batch.append(item)
            if batch:
                yield batch
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
