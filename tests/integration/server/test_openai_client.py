"""The `openai` client against a real server: Ray Serve, Head, two ranks, SmolLM2-135M."""

from __future__ import annotations

import math
from typing import Any

import openai
import pytest

QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


@pytest.fixture
def client(server: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_chat_answers_sensibly(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smollm2", messages=QUESTION, temperature=0, max_tokens=40)
    assert "Paris" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_gives_the_text_of_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="smollm2", prompt="Once upon a time", max_tokens=24, temperature=0)
    stream = client.completions.create(
        model="smollm2", prompt="Once upon a time", max_tokens=24, temperature=0, stream=True,
        stream_options={"include_usage": True})
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == 24


def test_logprobs_are_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smollm2", messages=QUESTION, temperature=0, max_tokens=8, logprobs=True, top_logprobs=5)
    for entry in answer.choices[0].logprobs.content:
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-6


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI) -> None:
    prompt = "Count: one, two, three, four, five, six,"
    whole = client.completions.create(model="smollm2", prompt=prompt, max_tokens=32, temperature=0).choices[0].text
    stop = whole[10:14]
    cut = client.completions.create(model="smollm2", prompt=prompt, max_tokens=32, temperature=0, stop=[stop])
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


def test_a_seed_repeats_and_n_differs(client: openai.OpenAI) -> None:
    ask = dict(model="smollm2", prompt="My favourite animal is", max_tokens=16, temperature=1.0, seed=7, n=3)
    first, second = client.completions.create(**ask), client.completions.create(**ask)
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) == 3


def test_token_ids_and_batches_are_prompts(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smollm2", prompt=[[504, 3575, 282, 4649, 314], [504, 3575, 282, 7042, 314]], max_tokens=4, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1]


@pytest.mark.parametrize(("change", "error"), [
    (dict(model="gpt-4"), openai.NotFoundError),
    (dict(prompt="word " * 3000), openai.BadRequestError),
    (dict(prompt=""), openai.BadRequestError),
    (dict(prompt=[[49152]]), openai.BadRequestError),
    (dict(temperature=-1), openai.BadRequestError),
    (dict(n=0), openai.BadRequestError),
    (dict(max_tokens=100_000), openai.BadRequestError),
    (dict(extra_body={"no_such_field": 1}), openai.BadRequestError),
])
def test_bad_requests_are_the_clients_own_exceptions(client: openai.OpenAI, change: dict, error: type) -> None:
    with pytest.raises(error):
        client.completions.create(**{"model": "smollm2", "prompt": "Hello", "max_tokens": 4, **change})


def test_a_bad_request_leaves_running_ones_alone(client: openai.OpenAI, server: Any) -> None:
    stream = client.completions.create(
        model="smollm2", prompt="Hello", max_tokens=64, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="smollm2", prompt="word " * 3000, max_tokens=4)
    assert sum(1 for _ in stream) > 10
    server.wait_until_idle(5)
