"""What sharing looks like to a client of the real server: cached tokens, beams, salts and the block map."""

from __future__ import annotations

import time
from typing import Any

import httpx
import openai
import pytest
from typer.testing import CliRunner

BLOCK_SIZE = 16


@pytest.fixture
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def cached_tokens(client: openai.OpenAI, prompt: list[int], **extra: Any) -> int:
    answer = client.completions.create(model="smollm2", prompt=prompt, max_tokens=2, temperature=0, extra_body=extra)
    return answer.usage.prompt_tokens_details.cached_tokens


def test_a_prompt_that_was_there_is_found_and_a_salt_keeps_tenants_apart(client: openai.OpenAI) -> None:
    prompt = list(range(1000, 1100))
    whole = (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert [cached_tokens(client, prompt) for _ in range(2)] == [0, whole]
    assert [cached_tokens(client, prompt, cache_salt="tenant") for _ in range(2)] == [0, whole]


def test_the_next_turn_of_a_chat_finds_the_last_one(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Name the four seasons and say a sentence about each."}]
    first = client.chat.completions.create(model="smollm2", messages=messages, temperature=0, max_tokens=48)
    messages += [{"role": "assistant", "content": first.choices[0].message.content},
                 {"role": "user", "content": "Which one is the coldest?"}]
    stream = client.chat.completions.create(
        model="smollm2", messages=messages, temperature=0, max_tokens=4, stream=True,
        stream_options={"include_usage": True})
    usage = list(stream)[-1].usage
    assert usage.prompt_tokens_details.cached_tokens > first.usage.prompt_tokens


def test_beams_come_best_first(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smollm2", prompt="The capital of France is", max_tokens=8, n=3, extra_body={"beam_width": 4})
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts)) == 3
    assert "Paris" in texts[0]


def test_a_beam_search_that_samples_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="top_p"):
        client.completions.create(
            model="smollm2", prompt="Hello", max_tokens=4, top_p=0.5, extra_body={"beam_width": 4})


def test_best_of_returns_the_likeliest(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smollm2", prompt="My favourite animal is", max_tokens=8, n=1, best_of=3, seed=3, temperature=1.0)
    assert len(answer.choices) == 1
    # As OpenAI counts: what was generated, not what was returned.
    assert answer.usage.completion_tokens == 24


def test_the_block_map_shows_a_running_request_and_its_shared_blocks(client: openai.OpenAI, server: Any) -> None:
    from kvarto.cluster.cli import app

    stream = client.completions.create(
        model="smollm2", prompt=list(range(2000, 2100)), max_tokens=200, n=2, temperature=1.0, seed=1, stream=True)
    next(iter(stream))
    group = httpx.get(f"{server.url}/v1/blocks").json()["groups"]["0"]
    assert {sequence["seq_index"] for sequence in group["sequences"]} == {0, 1}
    assert group["totals"]["shared"] >= 100 // BLOCK_SIZE
    assert "s" in group["kv_groups"][0]["device"]["states"]
    picture = CliRunner().invoke(app, ["status", "--blocks", "--url", server.url])
    assert picture.exit_code == 0, picture.output
    assert "shared" in picture.output
    stream.close()
    deadline = time.monotonic() + 10
    while httpx.get(f"{server.url}/v1/blocks").json()["groups"]["0"]["totals"]["used"]:
        assert time.monotonic() < deadline, "blocks of a request that nobody waits for"
        time.sleep(0.1)
