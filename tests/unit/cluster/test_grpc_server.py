"""`kvarto.v1.Inference`, health and reflection over a real channel."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvarto.cluster.frontend_protocol import Health
from kvarto.cluster.grpc.server import SERVICE_NAME, GrpcServer
from kvarto.protos import inference_pb2 as pb
from kvarto.protos.errors import ConfigError, ResourcesError, UnavailableError
from kvarto.protos.inference_pb2_grpc import InferenceStub
from kvarto.protos.sampling import SamplingParams

_spec = importlib.util.spec_from_file_location("http_fake", Path(__file__).with_name("http_fake.py"))
assert _spec and _spec.loader
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def asynchronous(test):
    @wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 20))

    return run


@asynccontextmanager
async def serving(**values):
    """A fake frontend, its server and a channel to it."""
    config = fake.make_config(**values)
    frontend = fake.FakeFrontend(config)
    server = GrpcServer(frontend, config)
    port = await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield frontend, server, channel
    finally:
        await server.stop(0)


async def generate(channel, metadata=None, **fields):
    return [response async for response in InferenceStub(channel).GenerateStream(
        pb.GenerateRequest(**fields), metadata=metadata)]


async def until(condition):
    """Seconds until `condition()` holds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < 1.0, "it did not come about within a second"
        await asyncio.sleep(0.01)


@asynchronous
async def test_stream_brings_text_tokens_finish_reason_and_usage_last():
    async with serving() as (_, _, channel):
        responses = await generate(channel, text="x" * 40, request_id="mine", sampling={"max_tokens": 5})
    assert "".join(response.text for response in responses) == "Hello"
    assert [token for response in responses for token in response.token_ids] == list(b"Hello")
    assert [response.finish_reason for response in responses] == [0, 0, 0, 0, pb.FINISH_REASON_LENGTH]
    assert [response.HasField("usage") for response in responses] == [False] * 4 + [True]
    usage = responses[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (41, 5, 32)
    assert {response.request_id for response in responses} == {"mine"}


@asynchronous
async def test_every_form_of_prompt_is_taken():
    async with serving() as (frontend, _, channel):
        await generate(channel, text="ab", model=fake.MODEL)
        await generate(channel, token_ids={"ids": [97, 98]})
        await generate(channel, chat={"messages": [{"role": "user", "content": "Hi"}]})
        assert [(bytes(prompt), params.max_tokens) for prompt, params, _ in frontend.submitted.values()] == [
            (b"\x01ab", 16), (b"ab", 16), (b"<user>Hi<assistant>", None)]


@asynchronous
async def test_two_requests_of_one_name_do_not_meet_in_the_engine():
    async with serving() as (frontend, _, channel):
        await asyncio.gather(*(generate(channel, text="a", request_id="same") for _ in range(2)))
        assert len(frontend.submitted) == 2


@asynchronous
async def test_zero_is_not_unset_and_unset_is_the_models_default():
    async with serving() as (frontend, _, channel):
        frontend.default_sampling = {"temperature": 0.6, "top_p": 0.9}
        await generate(channel, text="a", priority=-3, sampling={
            "temperature": 0.0, "logprobs": 0, "stop": ["z"], "logit_bias": {65: 1.5}, "seed": -1,
            "stop_token_ids": [9]})
        [(_, params, priority)] = frontend.submitted.values()
    assert priority == -3
    assert params == SamplingParams(temperature=0.0, top_p=0.9, logprobs=0, stop=["z"], logit_bias={65: 1.5}, seed=-1,
                                    stop_token_ids=[9])


def test_sampling_message_has_the_names_of_sampling_params():
    fields = {field.name for field in pb.SamplingParameters.DESCRIPTOR.fields}
    assert set(SamplingParams.__struct_fields__) - fields == {"detokenize"}
    assert not fields - set(SamplingParams.__struct_fields__)


@asynchronous
async def test_n_completions_with_logprobs_and_stop_strings():
    async with serving() as (_, _, channel):
        responses = await generate(channel, text="ab", sampling={
            "n": 2, "max_tokens": 8, "stop": ["o"], "logprobs": 1, "prompt_logprobs": 0})
    last = {response.index: response for response in responses if response.finish_reason}
    assert [last[index].finish_reason for index in (0, 1)] == [pb.FINISH_REASON_STOP] * 2
    assert last[0].WhichOneof("stop_reason") == "stop_string"
    assert last[0].stop_string == "o"
    assert [bool(response.HasField("usage")) for response in responses] == [False] * (len(responses) - 1) + [True]
    logprobs = responses[0].logprobs[0]
    assert (logprobs.token_id, logprobs.rank, logprobs.top_token_ids, logprobs.top_logprobs) == (72, 2, [73], [-0.25])
    assert [position.token_id for position in responses[0].prompt_logprobs] == [97, 98]


@asynchronous
async def test_beams_come_in_one_message_each_with_their_scores():
    async with serving() as (frontend, _, channel):
        frontend.default_sampling = {"temperature": 0.6}
        responses = await generate(channel, text="ab", cache_salt="tenant", sampling={
            "n": 2, "beam_width": 3, "max_tokens": 3, "length_penalty": 0.0, "early_stopping": pb.EARLY_STOPPING_NEVER})
        [(_, params, _)] = frontend.submitted.values()
    assert params == SamplingParams(n=2, beam_width=3, max_tokens=3, length_penalty=0.0, early_stopping="never")
    assert frontend.cache_salts == ["tenant"]
    assert [(response.text, response.cumulative_logprob, response.beam_score) for response in responses] == [
        ("Hel", -3.0, -1.5), ("ell", -4.0, -2.5)]
    assert responses[-1].usage.completion_tokens == 6


@pytest.mark.parametrize(("value", "expected"), [
    (pb.EARLY_STOPPING_UNSPECIFIED, False), (pb.EARLY_STOPPING_FALSE, False), (pb.EARLY_STOPPING_TRUE, True)])
@asynchronous
async def test_early_stopping_is_one_of_three(value, expected):
    async with serving() as (frontend, _, channel):
        await generate(channel, text="a", sampling={"beam_width": 2, "early_stopping": value})
        [(_, params, _)] = frontend.submitted.values()
    assert params.early_stopping is expected


@asynchronous
async def test_all_tokens_of_best_of_are_counted_and_cached_tokens_are_told_at_once():
    async with serving() as (_, _, channel):
        responses = await generate(channel, text="x" * 40, sampling={"n": 2, "best_of": 5, "max_tokens": 3})
    assert responses[-1].usage.completion_tokens == 15
    assert [response.num_cached_tokens for response in responses[:3]] == [32, 32, 0]
    assert not responses[0].HasField("cumulative_logprob")


@pytest.mark.parametrize(("fields", "code", "message"), [
    ({}, "INVALID_ARGUMENT", "no prompt"),
    ({"text": ""}, "INVALID_ARGUMENT", "empty"),
    ({"token_ids": {}}, "INVALID_ARGUMENT", "empty"),
    ({"token_ids": {"ids": [999]}}, "INVALID_ARGUMENT", "999"),
    ({"text": "x" * 600}, "INVALID_ARGUMENT", "max_model_len"),
    ({"chat": {}}, "INVALID_ARGUMENT", "no messages"),
    ({"chat": {"messages": [{"role": "king", "content": "a"}]}}, "INVALID_ARGUMENT", "king"),
    ({"text": "a", "sampling": {"temperature": -1}}, "INVALID_ARGUMENT", "temperature"),
    ({"text": "a", "sampling": {"temperature": float("nan")}}, "INVALID_ARGUMENT", "temperature"),
    ({"text": "a", "sampling": {"n": 0}}, "INVALID_ARGUMENT", "n must be"),
    ({"text": "a", "sampling": {"max_tokens": 0}}, "INVALID_ARGUMENT", "max_tokens"),
    ({"text": "a", "sampling": {"beam_width": 0}}, "INVALID_ARGUMENT", "beam_width"),
    ({"text": "a", "sampling": {"n": 3, "best_of": 2}}, "INVALID_ARGUMENT", "best_of"),
    ({"text": "a", "sampling": {"beam_width": 2, "early_stopping": 9}}, "INVALID_ARGUMENT", "early_stopping"),
    ({"text": "a", "cache_salt": "x" * 1025}, "INVALID_ARGUMENT", "cache_salt"),
    ({"text": "a", "model": "gpt-9"}, "NOT_FOUND", fake.MODEL),
])
@asynchronous
async def test_bad_requests_have_the_status_of_their_error(fields, code, message):
    async with serving() as (frontend, _, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(channel, **fields)
        assert not frontend.submitted
    assert caught.value.code() is grpc.StatusCode[code]
    assert message in caught.value.details()


@asynchronous
async def test_failures_midway_end_the_stream_with_their_status():
    async with serving() as (frontend, _, channel):
        frontend.failure, frontend.fail_after = UnavailableError("the worker group died"), 3
        call = InferenceStub(channel).GenerateStream(pb.GenerateRequest(text="a"))
        assert [(await call.read()).text for _ in range(3)] == ["H", "e", "l"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, "the worker group died")


@asynchronous
async def test_an_unexpected_failure_is_internal_and_tells_nothing():
    async with serving() as (frontend, _, channel):
        frontend.failure = ZeroDivisionError("secret")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(channel, text="a")
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in caught.value.details()


@pytest.mark.parametrize("far_apart", [False, True])
@asynchronous
async def test_cancelling_the_call_cancels_the_request(far_apart):
    async with serving() as (frontend, _, channel):
        frontend.delay_s = 0.01
        call = InferenceStub(channel).GenerateStream(pb.GenerateRequest(text="a", sampling={"max_tokens": 400}))
        await call.read()
        if far_apart:
            frontend.delay_s = 30
            await asyncio.sleep(0.05)
        call.cancel()
        await until(lambda: frontend.cancelled)
        assert not frontend.running


@asynchronous
async def test_a_client_that_closes_its_channel_cancels_its_requests():
    async with serving() as (frontend, _, channel):
        frontend.delay_s = 0.01
        stub = InferenceStub(channel)
        calls = [stub.GenerateStream(pb.GenerateRequest(text="a", sampling={"max_tokens": 400})) for _ in range(3)]
        for call in calls:
            await call.read()
        await channel.close()
        await until(lambda: len(frontend.cancelled) == 3)


@asynchronous
async def test_health_follows_the_frontend_for_every_service_name():
    async with serving() as (frontend, _, channel):
        stub = health_pb2_grpc.HealthStub(channel)

        async def check(name):
            return (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status

        assert [await check(name) for name in ("", SERVICE_NAME)] == [SERVING, SERVING]
        frontend.state = Health(live=True, ready=False, reason="rank 1 is dead")
        assert await check("") == NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await check("no.such.Service")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@asynchronous
async def test_draining_ends_watches_and_lets_running_calls_finish():
    async with serving() as (frontend, server, channel):
        frontend.delay_s = 0.02
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME))
        assert (await watch.read()).status == SERVING
        running = asyncio.create_task(generate(channel, text="a", sampling={"max_tokens": 20}))
        await until(lambda: frontend.running)
        start = time.monotonic()
        await server.stop(10)
        assert time.monotonic() - start < 3
        assert len(await running) == 20
        assert (await watch.read()).status == NOT_SERVING
        assert not frontend.cancelled


@asynchronous
async def test_what_is_not_finished_after_the_grace_is_cancelled():
    async with serving() as (frontend, server, channel):
        frontend.delay_s = 30
        running = asyncio.create_task(generate(channel, text="a"))
        await until(lambda: frontend.running)
        await server.stop(0.1)
        with pytest.raises(grpc.aio.AioRpcError):
            await running
        await until(lambda: frontend.cancelled)


@asynchronous
async def test_reflection_names_the_service():
    async with serving() as (_, _, channel):
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        [answer] = [answer async for answer in call]
    assert SERVICE_NAME == "kvarto.v1.Inference"
    assert SERVICE_NAME in {service.name for service in answer.list_services_response.service}


@pytest.mark.parametrize("value", [None, "secret", "Bearer wrong", "Bearer "])
@asynchronous
async def test_a_missing_or_wrong_key_is_unauthenticated(value):
    async with serving(api_key="secret") as (frontend, _, channel):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(channel, None if value is None else [("authorization", value)], text="a")
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert not frontend.submitted


@asynchronous
async def test_the_right_key_is_taken_and_health_needs_none():
    async with serving(api_key="secret") as (_, _, channel):
        assert len(await generate(channel, [("authorization", "Bearer secret")], text="a")) == 16
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == SERVING


@asynchronous
async def test_a_port_in_use_is_an_error_that_names_it():
    config = fake.make_config()
    frontend = fake.FakeFrontend(config)
    first = GrpcServer(frontend, config)
    port = await first.start()
    second = GrpcServer(frontend, fake.make_config(grpc_port=port))
    try:
        with pytest.raises(ResourcesError, match=str(port)):
            await second.start()
    finally:
        await first.stop(0)
        await second.stop(0)


def test_no_port_means_no_server():
    config = fake.make_config(grpc_port=None)
    with pytest.raises(ConfigError):
        GrpcServer(fake.FakeFrontend(config), config)
