"""Bad input and failures over HTTP: statuses, OpenAI's error format, and nothing left behind."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import httpx
import openai
import pytest

from kvarto.protos.errors import InvalidRequestError, PromptTooLongError, UnavailableError

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


def post(client, content, path="completions"):
    response = httpx.post(f"{client.base_url}{path}", content=content)
    return response.status_code, response.json()["error"]


def test_unknown_model_is_not_found(client, frontend):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt-9", prompt="a")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert fake.MODEL in caught.value.message
    assert not frontend.submitted


@pytest.mark.parametrize("content", [
    b"", b"{", b"hello", b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}',
    b'{"prompt": "a", "metadata": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
    b'{"messages": [], "chat_template_kwargs": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_001,
])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_malformed_json_is_answered(client, content, path):
    status, error = post(client, content, path)
    assert status in (400, 422)
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize(("content", "message"), [
    (b"{", "not valid JSON"), (b'{"prompt": "\xff"}', "not valid JSON"), (b'{"prompt": NaN}', "not valid JSON")])
def test_what_is_not_json_is_a_bad_request(client, content, message):
    status, error = post(client, content)
    assert status == 400
    assert message in error["message"]


@pytest.mark.parametrize(("values", "param"), [
    ({"temperature": -1}, "temperature"),
    ({"n": 0}, "n"),
    ({"n": 10**9}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 100_000}, "max_tokens"),
    ({"top_p": 0}, "top_p"),
    ({"logprobs": 21}, "logprobs"),
    ({"seed": 2**64}, "seed"),
    ({"logit_bias": {"300": 1}}, "logit_bias"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": [0, 256]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": [2**70]}, "prompt"),
    ({"suffix": "end"}, "suffix"),
    ({"best_of": 2, "n": 3}, "best_of"),
    ({"best_of": 9}, "best_of"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"extra_body": {"beam_width": 9}}, "beam_width"),
    ({"n": 3, "extra_body": {"beam_width": 2}}, "n"),
    ({"best_of": 2, "extra_body": {"beam_width": 2}}, "best_of"),
    ({"temperature": 0.5, "extra_body": {"beam_width": 2}}, "temperature"),
    ({"extra_body": {"use_beam_search": True, "beam_width": 2}}, "use_beam_search"),
    ({"extra_body": {"use_beam_search": True, "best_of": 1}}, "use_beam_search"),
    ({"extra_body": {"cache_salt": "x" * 1025}}, "cache_salt"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "echo": True, "logprobs": 1}, "echo"),
    ({"extra_body": {"use_beam_search": True}}, "use_beam_search"),
    ({"extra_body": {"stream": True, "stream_options": {"colour": 1}}}, "stream_options.colour"),
])
def test_bad_values_are_bad_requests_that_name_the_field(client, frontend, values, param):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, values.pop("prompt", "a"), **values)
    assert caught.value.param == param
    assert not frontend.submitted


@pytest.mark.parametrize(("values", "param"), [
    ({"temperature": "hot"}, "temperature"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"n": True}, "n"),
    ({"stop": [1]}, "stop[0]"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"prompt": {"text": "a"}}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [[1, "a"]]}, "prompt[0][1]"),
    ({"extra_body": {"priority": 2**40}}, "priority"),
    ({"extra_body": {"cache_salt": 5}}, "cache_salt"),
    ({"extra_body": {"beam_width": 2, "early_stopping": "always"}}, "early_stopping"),
])
def test_wrong_types_are_unprocessable_and_name_the_field(client, frontend, values, param):
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        complete(client, values.pop("prompt", "a"), **values)
    assert caught.value.param == param
    assert not frontend.submitted


@pytest.mark.parametrize("content", [b"{}", b"[]", b'"a"', b"null"])
def test_a_body_of_another_shape_is_unprocessable(client, content):
    assert post(client, content)[0] == 422


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_a_prompt_is_refused_with_openais_code(client, stream):
    with pytest.raises(openai.BadRequestError, match="max_model_len is 512") as caught:
        complete(client, "x" * 600, stream=stream)
    assert caught.value.code == "context_length_exceeded"


def test_one_bad_prompt_of_a_batch_keeps_all_from_being_submitted(client, frontend):
    with pytest.raises(openai.BadRequestError, match=r"prompt\[1\]: token id 999"):
        complete(client, [[1, 2], [999], [3]])
    assert not frontend.submitted


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_fails_midway_cancels_the_others(client, frontend, stream):
    frontend.delay_s, frontend.failure, frontend.fail_on = 0.005, UnavailableError("the worker group died"), b"bad"
    with pytest.raises(openai.InternalServerError, match="died") as caught:
        complete(client, ["good", "bad", "fine"], max_tokens=200, stream=stream)
    assert caught.value.status_code == 503
    assert caught.value.code == "unavailable"
    fake.wait_until(lambda: not frontend.running, 1.0)
    assert len(frontend.cancelled) == 3


def test_a_refusal_after_others_were_submitted_cancels_them(client, frontend, monkeypatch):
    def stream(prompt, params, **values):
        if prompt == [3]:
            raise PromptTooLongError("no room")
        return fake.FakeFrontend.stream(frontend, prompt, params, **values)

    monkeypatch.setattr(frontend, "stream", stream)
    with pytest.raises(openai.BadRequestError, match="no room"):
        complete(client, [[1], [2], [3]])
    assert len(frontend.submitted) == 2
    assert not frontend.running


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_before_the_first_token_has_its_own_status(client, frontend, stream):
    frontend.failure = InvalidRequestError("it can never fit", param="max_tokens")
    with pytest.raises(openai.BadRequestError, match="never fit") as caught:
        complete(client, stream=stream)
    assert caught.value.param == "max_tokens"


def test_a_failure_midway_ends_the_stream_with_an_error_event_and_no_done(client, frontend):
    frontend.failure, frontend.fail_after = UnavailableError("the worker group died"), 3
    response = httpx.post(f"{client.base_url}completions", json={"prompt": "a", "max_tokens": 9, "stream": True})
    events = response.text.strip().split("\n\n")
    assert response.status_code == 200
    assert len(events) == 4
    assert events[-1] == ('data: {"error":{"message":"the worker group died","type":"server_error","param":null,'
                          '"code":"unavailable"}}')


@pytest.mark.parametrize("path", ["completions", "chat"])
def test_a_failure_midway_raises_in_the_client(client, frontend, path):
    frontend.failure, frontend.fail_after = UnavailableError("the worker group died"), 3
    if path == "chat":
        stream = client.chat.completions.create(
            model=fake.MODEL, messages=[{"role": "user", "content": "a"}], stream=True)
    else:
        stream = complete(client, stream=True)
    next(stream)
    with pytest.raises(openai.APIError, match="died"):
        list(stream)


@pytest.mark.parametrize("stream", [False, True])
def test_an_unexpected_failure_is_a_500_that_tells_nothing_and_is_logged(client, frontend, stream, caplog):
    frontend.failure = ZeroDivisionError("secret path /root")
    with pytest.raises(openai.InternalServerError) as caught:
        complete(client, stream=stream)
    assert caught.value.status_code == 500
    assert "secret" not in caught.value.message
    assert "ZeroDivisionError: secret path /root" in caplog.text


def test_an_engine_that_stops_short_is_an_error_and_not_a_short_answer(client, frontend, monkeypatch):
    monkeypatch.setattr(frontend, "chunks", lambda *_: _nothing())
    with pytest.raises(openai.InternalServerError):
        complete(client)


async def _nothing():
    return
    yield


def test_paths_and_methods_that_do_not_exist_have_openais_format(client):
    for response, status in ((httpx.get(f"{client.base_url}nothing"), 404),
                             (httpx.get(f"{client.base_url}completions"), 405)):
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_requests_go_on_while_others_are_refused(client, frontend):
    frontend.delay_s = 0.01
    stream = complete(client, max_tokens=30, stream=True)
    next(stream)
    for content in (b"{", b"{}", b'{"prompt": ""}', b'{"prompt": "a", "n": 0}'):
        post(client, content)
    assert sum(len(chunk.choices) for chunk in stream) == 29
