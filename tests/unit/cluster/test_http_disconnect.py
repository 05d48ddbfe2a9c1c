"""A client that goes away: its request is cancelled within a second, streamed or not."""

from __future__ import annotations

import asyncio
import importlib.util
import random
from pathlib import Path

import httpx
import openai
import pytest

_spec = importlib.util.spec_from_file_location("http_fake", Path(__file__).with_name("http_fake.py"))
assert _spec and _spec.loader
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)

BODY = {"prompt": "Say it", "max_tokens": 400}


@pytest.fixture(scope="module")
def server():
    with fake.shared_server() as server:
        yield server


@pytest.fixture
def frontend(server):
    return server(fake.FakeFrontend(fake.make_config(), delay_s=0.05))


@pytest.fixture
def url(frontend):
    return f"{frontend.url}/v1/completions"


def cancelled_soon(frontend, num=1):
    return fake.wait_until(lambda: len(frontend.cancelled) == num, 1.0)


def test_leaving_a_stream_cancels_it(frontend, url):
    with httpx.stream("POST", url, json=BODY | {"stream": True}) as response:
        next(response.iter_raw())
    cancelled_soon(frontend)
    assert not frontend.running


def test_leaving_a_stream_before_its_first_token_cancels_it(frontend, url):
    frontend.delay_s = 30
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=BODY | {"stream": True}, timeout=0.3)
    cancelled_soon(frontend)


def test_leaving_a_stream_between_two_tokens_far_apart_cancels_it(frontend, url):
    with httpx.stream("POST", url, json=BODY | {"stream": True}) as response:
        chunks = response.iter_raw()
        next(chunks)
        frontend.delay_s = 30
        next(chunks)
    cancelled_soon(frontend)


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_giving_up_on_a_reply_that_is_not_streamed_cancels_it(frontend, url, num_prompts):
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=BODY | {"prompt": ["Say it"] * num_prompts}, timeout=0.3)
    cancelled_soon(frontend, num_prompts)
    assert not frontend.running


def test_closing_the_openai_clients_stream_cancels_the_request(frontend, url):
    with openai.OpenAI(base_url=url.removesuffix("/completions"), api_key="x", max_retries=0) as client:
        stream = client.completions.create(model=fake.MODEL, prompt="a", max_tokens=400, stream=True)
        next(stream)
        stream.close()
        cancelled_soon(frontend)


def test_of_64_streams_half_are_cut_and_all_others_complete(frontend, url):
    frontend.delay_s = 0.005
    randomness = random.Random(7)

    async def one(client, cut_after):
        body = {"prompt": "a", "max_tokens": 40, "stream": True}
        async with client.stream("POST", url, json=body) as response:
            num = 0
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    return num
                num += bool(line)
                if num == cut_after:
                    return None
        return -1

    async def all_of_them():
        cuts = [randomness.randint(1, 30) if i % 2 else 0 for i in range(64)]
        async with httpx.AsyncClient(timeout=30, limits=httpx.Limits(max_connections=64)) as client:
            return await asyncio.gather(*(one(client, cut) for cut in cuts))

    results = asyncio.run(all_of_them())
    assert results == [None if i % 2 else 40 for i in range(64)]
    fake.wait_until(lambda: not frontend.running, 1.0)
    assert len(frontend.cancelled) == 32
