"""`/v1/completions` as the openai client sees it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import httpx
import openai
import pytest

_spec = importlib.util.spec_from_file_location("http_fake", Path(__file__).with_name("http_fake.py"))
assert _spec and _spec.loader
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)


@pytest.fixture(scope="module")
def server():
    with fake.shared_server() as server:
        yield server


@pytest.fixture
def frontend(server):
    return server(fake.FakeFrontend(fake.make_config()))


@pytest.fixture
def client(frontend):
    with openai.OpenAI(base_url=f"{frontend.url}/v1", api_key="x", max_retries=0) as client:
        yield client


def complete(client, prompt="Say it", **values):
    return client.completions.create(model=fake.MODEL, prompt=prompt, **values)


def test_completion_has_text_usage_and_finish_reason(client):
    result = complete(client, max_tokens=5)
    assert (result.object, result.model) == ("text_completion", fake.MODEL)
    assert result.choices[0].text == "Hello"
    assert result.choices[0].finish_reason == "length"
    assert (result.usage.prompt_tokens, result.usage.completion_tokens, result.usage.total_tokens) == (7, 5, 12)
    assert result.usage.prompt_tokens_details.cached_tokens == 0


def test_max_tokens_is_16_by_default(client):
    assert complete(client).usage.completion_tokens == 16


def test_cached_tokens_are_summed_over_prompts(client):
    result = complete(client, ["x" * 40, "y" * 20], max_tokens=1)
    assert result.usage.prompt_tokens == 62
    assert result.usage.prompt_tokens_details.cached_tokens == 48


def test_stop_string_ends_the_text_before_it(client):
    choice = complete(client, max_tokens=14, stop=", ").choices[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == ("Hello,", "stop", ", ")


@pytest.mark.parametrize(("prompt", "expected"), [
    ("ab", [[1, 97, 98]]),
    (["ab", "c"], [[1, 97, 98], [1, 99]]),
    ([97, 98], [[97, 98]]),
    ([[97, 98], [99]], [[97, 98], [99]]),
])
def test_every_form_of_prompt_is_taken(client, frontend, prompt, expected):
    result = complete(client, prompt, max_tokens=2)
    assert [submitted[0] for submitted in frontend.submitted.values()] == expected
    assert [choice.index for choice in result.choices] == list(range(len(expected)))


def test_choices_of_several_prompts_and_n_are_numbered_by_prompt(client):
    result = complete(client, ["a", "b"], n=2, max_tokens=3)
    assert [(c.index, c.text) for c in result.choices] == [(0, "Hel"), (1, "ell"), (2, "Hel"), (3, "ell")]


def test_logprobs_are_columns_with_the_sampled_token_among_the_top(client):
    logprobs = complete(client, max_tokens=3, logprobs=2).choices[0].logprobs
    assert logprobs.tokens == ["H", "e", "l"]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.text_offset == [0, 1, 2]
    assert logprobs.top_logprobs[0] == {"I": -0.25, "J": -1.25, "H": -0.5}


def test_echo_puts_the_prompt_and_its_logprobs_first(client):
    choice = complete(client, "ab", max_tokens=2, echo=True, logprobs=1).choices[0]
    assert choice.text == "abHe"
    assert choice.logprobs.tokens == ["\x01", "a", "b", "H", "e"]
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5, -0.5, -0.5]
    assert choice.logprobs.top_logprobs[:2] == [None, {"b": -0.25, "a": -0.5}]
    assert choice.logprobs.text_offset == [0, 1, 2, 3, 4]


def test_echo_of_token_ids_is_their_text_also_in_a_stream(client):
    assert complete(client, [97, 98], max_tokens=1, echo=True).choices[0].text == "abH"
    chunks = list(complete(client, [97, 98], max_tokens=2, echo=True, stream=True))
    assert [chunk.choices[0].text for chunk in chunks] == ["abH", "e"]


def test_prompt_logprobs_have_vllms_form(client):
    choice = complete(client, "a", max_tokens=1, extra_body={"prompt_logprobs": 1}).choices[0]
    assert choice.prompt_logprobs == [None, {
        "98": {"logprob": -0.25, "rank": 1, "decoded_token": "b"},
        "97": {"logprob": -0.5, "rank": 2, "decoded_token": "a"}}]


def test_stream_has_the_same_text_and_one_finish_reason(client):
    chunks = list(complete(client, max_tokens=5, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Hello"
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * 4 + ["length"]
    assert all(chunk.usage is None for chunk in chunks)
    assert len({chunk.id for chunk in chunks}) == 1


def test_stream_with_include_usage_ends_with_a_chunk_without_choices(client):
    *chunks, last = complete(client, max_tokens=5, stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (7, 5)


def test_continuous_usage_counts_up(client):
    chunks = complete(client, max_tokens=3, stream=True,
                      stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert [chunk.usage.completion_tokens for chunk in chunks] == [1, 2, 3, 3]


def test_stream_offsets_of_logprobs_go_on_from_chunk_to_chunk(client):
    chunks = list(complete(client, max_tokens=3, logprobs=0, stream=True))
    assert [chunk.choices[0].logprobs.text_offset for chunk in chunks] == [[0], [1], [2]]


def test_stream_of_several_prompts_brings_every_choice(client):
    texts = {}
    for chunk in complete(client, ["a", "b", "c"], n=2, max_tokens=4, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {0: "Hell", 1: "ello", 2: "Hell", 3: "ello", 4: "Hell", 5: "ello"}


def test_stream_is_events_of_single_lines_that_end_with_done(client):
    response = httpx.post(f"{client.base_url}completions", json={"prompt": "a", "max_tokens": 2, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") and "\n" not in event for event in events[:-1])
    assert '"usage"' not in events[0]
    assert '"finish_reason":null' in events[0]


def test_vllms_fields_and_the_models_defaults_reach_the_engine(client, frontend):
    frontend.default_sampling = {"temperature": 0.6, "top_p": 0.9}
    complete(client, "ab", temperature=0.25, seed=7, logit_bias={"65": -2.5}, extra_body={
        "ignore_eos": True, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [3], "min_tokens": 2,
        "priority": -4, "skip_special_tokens": False, "include_stop_str_in_output": True,
        "add_special_tokens": False})
    [(prompt, params, priority)] = frontend.submitted.values()
    assert (prompt, priority) == ([97, 98], -4)
    assert (params.temperature, params.top_p, params.seed, params.top_k) == (0.25, 0.9, 7, 5)
    assert (params.min_p, params.repetition_penalty, params.min_tokens) == (0.1, 1.1, 2)
    assert (params.logit_bias, params.stop_token_ids) == ({65: -2.5}, [3])
    assert params.ignore_eos
    assert params.include_stop_str_in_output
    assert not params.skip_special_tokens


def test_null_means_left_out(client):
    response = httpx.post(f"{client.base_url}completions", json={
        "prompt": "a", "temperature": None, "n": None, "stop": None, "stream": None, "logprobs": None, "echo": None})
    assert response.json()["choices"][0]["text"] == "Hello, world. He"


def test_a_long_prompt_is_tokenized_like_a_short_one(client, frontend):
    frontend.info = fake.EngineInfo(**{f: getattr(frontend.info, f) for f in frontend.info.__struct_fields__} | {
        "max_model_len": 50_000, "kv_pools": [fake.KVPool(num_blocks=4000)]})
    assert complete(client, "x" * 20_000, max_tokens=1).usage.prompt_tokens == 20_001


def test_the_best_of_several_are_asked_for_and_all_of_their_tokens_are_counted(client, frontend):
    result = complete(client, n=2, best_of=5, max_tokens=3)
    [(_, params, _)] = frontend.submitted.values()
    assert (params.n, params.best_of) == (2, 5)
    assert [choice.index for choice in result.choices] == [0, 1]
    assert result.usage.completion_tokens == 15


def test_best_of_as_many_as_n_may_be_streamed(client):
    assert len(list(complete(client, n=2, best_of=2, max_tokens=1, stream=True))) == 2


@pytest.mark.parametrize(("sent", "n", "beam_width"), [
    ({"beam_width": 3}, 1, 3), ({"n": 2, "beam_width": 3}, 2, 3), ({"use_beam_search": True, "n": 2}, 2, 2),
    ({"use_beam_search": True, "n": 2, "best_of": 4}, 2, 4), ({"use_beam_search": True, "best_of": 4}, 1, 4),
    ({"use_beam_search": False, "n": 2}, 2, None)])
def test_a_beam_search_may_be_asked_for_in_either_way(client, frontend, sent, n, beam_width):
    result = complete(client, max_tokens=3, extra_body=sent)
    [(_, params, _)] = frontend.submitted.values()
    assert (params.n, params.beam_width, params.best_of) == (n, beam_width, None)
    assert [choice.text for choice in result.choices] == ["Hel", "ell"][:n]


def test_beams_may_be_streamed_one_chunk_each(client):
    chunks = list(complete(client, n=2, max_tokens=3, stream=True, extra_body={"beam_width": 2}))
    assert [(chunk.choices[0].index, chunk.choices[0].text) for chunk in chunks] == [(0, "Hel"), (1, "ell")]


def test_parameters_of_a_beam_search_reach_the_engine_without_the_models_defaults(client, frontend):
    frontend.default_sampling = {"temperature": 0.6, "top_p": 0.9, "top_k": 20}
    complete(client, temperature=0, extra_body={"beam_width": 2, "length_penalty": 0.5, "early_stopping": "never"})
    [(_, params, _)] = frontend.submitted.values()
    assert (params.length_penalty, params.early_stopping, params.temperature) == (0.5, "never", 0)
    assert (params.top_p, params.top_k) == (1.0, None)


@pytest.mark.parametrize("stream", [False, True])
def test_a_cache_salt_reaches_the_engine_for_every_prompt(client, frontend, stream):
    list(complete(client, ["a", "b"], max_tokens=1, stream=stream, extra_body={"cache_salt": "tenant"}))
    complete(client, max_tokens=1)
    assert frontend.cache_salts == ["tenant", "tenant", ""]


def test_the_usage_of_a_stream_has_the_cached_tokens(client):
    *_, last = complete(client, "x" * 40, max_tokens=2, stream=True, stream_options={"include_usage": True})
    assert last.usage.prompt_tokens_details.cached_tokens == 32
