"""A load on a server: requests sent when they are due, and what became of each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Protocol

from ....protos.errors import KvartoError
from .outcome import Outcome
from .trace import TraceRequest


class StreamClient(Protocol):
    """Streams answers of one server."""

    counts_pieces: bool
    """Whether the server has not said how many tokens a piece holds, so that each counted as one."""

    def stream(self, prompt: list[int], output_len: int) -> AsyncGenerator[int, None]:
        """Generate `output_len` tokens, greedily and past the end of sequence. Yields, as each piece arrives, how
        many tokens have come so far; last the server's own total, with or without a further piece. Raises
        `KvartoError`."""


async def run_load(
    client: StreamClient, requests: Sequence[TraceRequest], due: Sequence[float], timeout_s: float,
    on_end: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Send `requests[i]` `due[i]` seconds from now, none waiting for another. Failures are outcomes, not exceptions."""
    began = time.perf_counter()
    outcomes = [Outcome(arrived) for arrived in due]
    tasks = [asyncio.create_task(_run(client, request, outcome, began, timeout_s, on_end))
             for request, outcome in zip(requests, outcomes, strict=True)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return outcomes


async def _run(client: StreamClient, request: TraceRequest, outcome: Outcome, began: float, timeout_s: float,
               on_end: Callable[[], None]) -> None:
    await asyncio.sleep(outcome.arrived - (time.perf_counter() - began))
    try:
        async with asyncio.timeout(timeout_s), aclosing(client.stream(request.prompt, request.output_len)) as counts:
            count = 0
            async for count in counts:
                if count > outcome.num_tokens:
                    outcome.arrivals.append((time.perf_counter() - began, count))
        outcome.end_with(count)
        if outcome.num_tokens != request.output_len:
            outcome.error = f"ended after {outcome.num_tokens} of {request.output_len} tokens"
    except KvartoError as error:
        outcome.error = error.message
    except TimeoutError:
        outcome.error = f"not ended within {timeout_s:g} s"
    on_end()
