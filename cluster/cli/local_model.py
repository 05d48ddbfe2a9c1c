"""A model that a command loads for itself."""

from __future__ import annotations

from collections.abc import Coroutine, Generator, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ...protos.config import EngineConfig
from ...protos.errors import InvalidRequestError

if TYPE_CHECKING:
    from ...protos.sampling import SamplingParams
    from ..frontend.async_llm import AsyncLLM
    from ..frontend.request_state import RequestState
    from ..outputs import StreamChunk
T = TypeVar("T")


class LocalModel:
    """An `AsyncLLM` for the synchronous code of a command, as a context manager.

    Its event loop has a thread of its own and never rests: a frontend that waits for a person to type must go on
    answering the Head. Ctrl-C reaches the command's own thread, whose wait for a chunk it ends.
    """

    frontend: AsyncLLM

    def __init__(self, config: EngineConfig) -> None:
        """Load the model. Raises `ConfigError` and its kin; nothing is left running then."""
        from rich.console import Console

        from ..frontend.async_llm import AsyncLLM
        from ..frontend.background_loop import BackgroundLoop

        self._loop = BackgroundLoop()
        try:
            with Console(stderr=True).status(f"loading {config.model}"):
                self.frontend = self._loop.run(AsyncLLM.start(**config.model_dump(exclude_unset=True)))
        except BaseException:
            self._loop.close()
            raise

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What `coroutine` returns or raises, run on the model's event loop."""
        return self._loop.run(coroutine)

    def submit(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[RequestState]:
        """Submit all prompts at once. Each is checked before the first is submitted: raises `InvalidRequestError`."""
        return self.run(self._submit(prompts, params))

    def chunks(self, request: RequestState) -> Generator[StreamChunk, None, None]:
        """The chunks of a submitted request. Closing the generator cancels the request."""
        try:
            while (chunk := self.run(_next_chunk(request))) is not None:
                yield chunk
        finally:
            self.run(request.aclose())

    def close(self) -> None:
        """End what was started."""
        self.run(self.frontend.close())
        self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _submit(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[RequestState]:
        requests = []
        for number, token_ids in enumerate(prompts, start=1):
            try:
                requests.append(self.frontend.prepare(token_ids, params))
            except InvalidRequestError as error:
                if len(prompts) > 1:
                    raise type(error)(f"prompt {number}: {error.message}", param=error.param) from None
                raise
        return [self.frontend.submit(request) for request in requests]


async def _next_chunk(request: RequestState) -> StreamChunk | None:
    return await anext(request, None)
