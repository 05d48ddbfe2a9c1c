"""A job to a response, whole or streamed: the part that both endpoints share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from typing import Generic, TypeVar

from msgspec import UNSET, Struct, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from ..frontend_protocol import Frontend
from ..outputs import StreamChunk
from .disconnect import while_connected
from .errors import json_response
from .progress import Choice, Progress
from .replies import Usage
from .schemas import GenerateBody
from .sse import DONE, EventStream, event
from .streams import Job, opened

News = TypeVar("News", bound=Struct)


class Style(ABC, Generic[News]):
    """How one endpoint words what the engine says."""

    @abstractmethod
    def news(self, choice: Choice, chunk: StreamChunk) -> Sequence[News]:
        """`chunk` as entries of `choices`, one for each event of a stream; none when there is nothing to say yet."""

    @abstractmethod
    def event(self, choices: list[News], usage: Usage | UnsetType | None) -> Struct:
        """The body of one event."""

    @abstractmethod
    def whole(self, choices: list[Choice], usage: Usage) -> Struct:
        """The body of a reply that is not streamed."""


async def answer(request: Request, frontend: Frontend, job: Job, style: Style[News], body: GenerateBody) -> Response:
    """Run `job` and word its reply. The engine is left alone again as soon as the client goes away."""
    if not body.stream:
        return json_response(await while_connected(request.receive, _whole(frontend, job, style)))
    options = body.stream_options
    include_usage = options is not None and bool(options.include_usage)
    continuous = options is not None and include_usage and bool(options.continuous_usage_stats)
    return EventStream(_events(frontend, job, style, include_usage, continuous))


async def _whole(frontend: Frontend, job: Job, style: Style[News]) -> Struct:
    progress = Progress(job)
    async with opened(frontend, job) as batches:
        async for batch in batches:
            for place, chunk in batch:
                progress.take(place, chunk).keep(chunk)
    return style.whole(progress.finished(), progress.usage())


async def _events(frontend: Frontend, job: Job, style: Style[News], include_usage: bool,
                  continuous: bool) -> AsyncGenerator[bytes, None]:
    progress = Progress(job)
    usage: Usage | UnsetType | None = None if include_usage else UNSET
    async with opened(frontend, job) as batches:
        async for batch in batches:
            written = []
            for place, chunk in batch:
                choice = progress.take(place, chunk)
                if news := style.news(choice, chunk):
                    usage = progress.usage() if continuous else usage
                    written += [event(style.event([piece], usage)) for piece in news]
            if written:
                yield b"".join(written)
    progress.finished()
    yield (event(style.event([], progress.usage())) if include_usage else b"") + DONE
