"""Clients that go away: their blocks come back at once, and nobody else notices."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import httpx
import pytest

STREAMS = 64
TOKENS = 48

pytestmark = pytest.mark.parametrize(
    "server", [(), ("--num-frontends", "2")], indirect=True, ids=["own-port", "behind-serves-proxy"])


async def read_stream(client: httpx.AsyncClient, index: int, cut_after: int | None) -> int | None:
    """Tokens that the server counted, or None for a stream that is dropped after `cut_after` events."""
    body = {"model": "smollm2", "prompt": f"Story number {index}:", "max_tokens": TOKENS, "ignore_eos": True,
            "temperature": 1.0, "seed": index, "stream": True, "stream_options": {"include_usage": True}}
    events: list[str] = []
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line:
                events.append(line)
            if cut_after is not None and len(events) >= cut_after:
                return None
    assert events[-1] == "data: [DONE]"
    return json.loads(events[-2].removeprefix("data: "))["usage"]["completion_tokens"]


def test_half_of_64_streams_cut_at_random_leak_nothing(server: Any) -> None:
    rng = random.Random(0)
    cuts = [rng.randrange(1, TOKENS // 2) if index % 2 else None for index in range(STREAMS)]

    async def run() -> list[int | None]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
            return await asyncio.gather(*(read_stream(client, index, cut) for index, cut in enumerate(cuts)))

    counts = asyncio.run(run())
    assert counts == [TOKENS if cut is None else None for cut in cuts]
    status = server.wait_until_idle(5)
    assert status["num_running"] == status["num_waiting"] == 0


def test_blocks_are_free_within_a_second_of_a_disconnect(server: Any) -> None:
    body = {"model": "smollm2", "prompt": "Hello", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        for _ in range(8):
            next(lines)
        assert server.status()["blocks"]["used"] > 0
    gone = time.monotonic()
    server.wait_until_idle(timeout_s=3)
    # A second to learn of it, a step, and the time that asking takes.
    assert time.monotonic() - gone < 2


def test_a_client_that_leaves_without_streaming_is_noticed(server: Any) -> None:
    body = {"model": "smollm2", "prompt": "Hello", "max_tokens": 900, "ignore_eos": True}
    try:
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=1)
    except httpx.ReadTimeout:
        pass
    else:
        raise AssertionError("900 tokens in a second: make the request longer")
    server.wait_until_idle(timeout_s=3)
