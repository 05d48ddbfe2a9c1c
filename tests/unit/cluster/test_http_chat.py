"""`/v1/chat/completions` as the openai client sees it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import openai
import pytest

_spec = importlib.util.spec_from_file_location("http_fake", Path(__file__).with_name("http_fake.py"))
assert _spec and _spec.loader
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server():
    with fake.shared_server() as server:
        yield server


@pytest.fixture
def frontend(server):
    return server(fake.FakeFrontend(fake.make_config(served_model_name="small")))


@pytest.fixture
def client(frontend):
    with openai.OpenAI(base_url=f"{frontend.url}/v1", api_key="x", max_retries=0) as client:
        yield client


def chat(client, messages=MESSAGES, **values):
    return client.chat.completions.create(model="small", messages=messages, **values)


def prompts(frontend):
    return [bytes(prompt).decode() for prompt, _, _ in frontend.submitted.values()]


def test_answer_is_an_assistant_message_as_long_as_it_fits(client, frontend):
    result = chat(client)
    message = result.choices[0].message
    assert (result.object, result.model) == ("chat.completion", "small")
    assert (message.role, message.content, message.refusal) == ("assistant", "Hello, world. ", None)
    assert result.usage.prompt_tokens == len("<user>Hi<assistant>")
    [(_, params, _)] = frontend.submitted.values()
    assert params.max_tokens is None


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_either_name_of_max_tokens_counts(client, name):
    assert chat(client, **{name: 3}).choices[0].message.content == "Hel"


def test_template_gets_roles_texts_and_kwargs(client, frontend):
    chat(client, [{"role": "developer", "content": "Be brief"}, {"role": "user", "content": "Hi"}],
         extra_body={"chat_template_kwargs": {"thinking": False}, "add_generation_prompt": False})
    assert prompts(frontend) == ["<system>Be brief<user>Hithinking=False"]


def test_content_parts_reach_the_template(client, frontend):
    chat(client, [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
    assert "'text': 'Hi'" in prompts(frontend)[0]


def test_an_answer_can_be_sent_back(client):
    first = chat(client).choices[0].message
    assert chat(client, [*MESSAGES, first, *MESSAGES]).choices[0].finish_reason == "length"


def test_logprobs_are_rows_with_bytes_and_exactly_the_top_asked_for(client):
    rows = chat(client, max_tokens=2, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [(row.token, row.logprob, row.bytes) for row in rows] == [("H", -0.5, [72]), ("e", -0.5, [101])]
    assert [(top.token, top.logprob, top.bytes) for top in rows[0].top_logprobs] == [
        ("I", -0.25, [73]), ("J", -1.25, [74])]


def test_logprobs_without_top_logprobs(client):
    row = chat(client, max_tokens=1, logprobs=True).choices[0].logprobs.content[0]
    assert (row.token, row.top_logprobs) == ("H", [])


def test_stream_begins_with_the_role_and_ends_with_the_finish_reason(client):
    chunks = [chunk.choices[0] for chunk in chat(client, max_tokens=5, stream=True)]
    assert (chunks[0].delta.role, chunks[0].delta.content) == ("assistant", "")
    assert all(chunk.delta.role is None for chunk in chunks[1:])
    assert "".join(chunk.delta.content or "" for chunk in chunks) == "Hello"
    assert [chunk.finish_reason for chunk in chunks] == [None] * 5 + ["length"]


def test_stream_of_n_answers_gives_each_its_role(client):
    roles, texts = [], {}
    for chunk in chat(client, max_tokens=3, n=2, stream=True):
        choice = chunk.choices[0]
        roles += [choice.index] if choice.delta.role else []
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    assert sorted(roles) == [0, 1]
    assert texts == {0: "Hel", 1: "ell"}


def test_stream_carries_logprobs_and_usage(client):
    *chunks, last = chat(client, max_tokens=2, logprobs=True, top_logprobs=1, stream=True,
                         stream_options={"include_usage": True})
    rows = [row for chunk in chunks if chunk.choices[0].logprobs for row in chunk.choices[0].logprobs.content]
    assert [row.token for row in rows] == ["H", "e"]
    assert last.choices == []
    assert last.usage.completion_tokens == 2


def test_stop_reason_of_a_stream_is_told(client):
    *_, last = chat(client, stop=["world"], stream=True)
    assert (last.choices[0].finish_reason, last.choices[0].stop_reason) == ("stop", "world")


def test_what_asks_for_no_tools_is_taken(client):
    chat(client, max_tokens=1, tools=[], tool_choice="none", response_format={"type": "text"})


@pytest.mark.parametrize(("values", "param"), [
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_tokens": 2, "max_completion_tokens": 3}, "max_completion_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].image_url"),
    ({"extra_body": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}}, "chat_template_kwargs"),
    ({"stream": True, "extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs"),
])
def test_what_is_not_supported_is_refused_by_name(client, frontend, values, param):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **values)
    assert caught.value.param == param
    assert not frontend.submitted


def test_model_without_a_template_says_what_to_use(client, frontend):
    frontend.tokenizer = fake.FakeTokenizer(has_chat_template=False)
    with pytest.raises(openai.BadRequestError, match="chat template"):
        chat(client)


@pytest.mark.parametrize(("sent", "expected"), [
    ({"n": 2, "best_of": 3}, (2, 3, None)), ({"n": 2, "beam_width": 3}, (2, None, 3)),
    ({"n": 2, "use_beam_search": True}, (2, None, 2))])
def test_the_best_of_several_and_beams_may_be_asked_for(client, frontend, sent, expected):
    frontend.default_sampling = {} if "best_of" in sent else {"temperature": 0.6}
    result = chat(client, max_tokens=2, extra_body=sent)
    [(_, params, _)] = frontend.submitted.values()
    assert (params.n, params.best_of, params.beam_width) == expected
    assert [choice.message.content for choice in result.choices] == ["He", "el"]


def test_the_best_of_several_are_not_streamed(client, frontend):
    with pytest.raises(openai.BadRequestError, match="stream=false") as caught:
        chat(client, stream=True, extra_body={"best_of": 2})
    assert caught.value.param == "best_of"
    assert not frontend.submitted


@pytest.mark.parametrize("stream", [False, True])
def test_a_cache_salt_reaches_the_engine(client, frontend, stream):
    list(chat(client, max_tokens=1, stream=stream, extra_body={"cache_salt": "tenant"}))
    assert frontend.cache_salts == ["tenant"]


@pytest.mark.parametrize("stream", [False, True])
def test_usage_has_the_cached_tokens(client, stream):
    values = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    result = chat(client, [{"role": "user", "content": "x" * 40}], max_tokens=1, **values)
    usage = list(result)[-1].usage if stream else result.usage
    assert usage.prompt_tokens_details.cached_tokens == 48
