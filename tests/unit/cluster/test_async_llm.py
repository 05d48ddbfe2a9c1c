"""The frontend that owns requests, with a connection whose other end is the test."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarto.cluster.frontend import async_llm as module
from kvarto.cluster.frontend.async_llm import AsyncLLM
from kvarto.cluster.frontend.client import EngineClient
from kvarto.protos.config import ServeConfig
from kvarto.protos.errors import InvalidRequestError, KvartoError, PromptTooLongError, UnavailableError
from kvarto.protos.request import AddRequest, CancelRequest, Delta, DeltaBatch, Pong, Query, Reply, RequestError
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.step import TokenLogprobs

_spec = importlib.util.spec_from_file_location("engine_fake", Path(__file__).with_name("engine_fake.py"))
assert _spec and _spec.loader
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)


class ByteTokenizer:
    special_token_ids = frozenset({0})
    codec_errors = "replace"

    def encode(self, text, add_special_tokens=True):
        return list(text.encode())

    def token_bytes(self, token_id, *, first=False):
        return bytes([token_id])

    def token_text(self, token_id):
        return chr(token_id)


class FakeConnection:
    name = "fake"

    def __init__(self):
        self.sent, self.closed = [], False

    def send(self, message):
        self.sent.append(message)

    async def close(self):
        self.closed = True


class World:
    """Must be made inside an event loop. The Head has answered a ping."""

    def __init__(self, **info):
        self.client = EngineClient()
        self.connection = self.client.connection = FakeConnection()
        self.llm = AsyncLLM(
            ServeConfig(model="m"), self.client, fake.make_info(vocab_size=256, **info), (ByteTokenizer(), {}))
        self.client.take(Pong(epoch=1))

    def sent(self, kind):
        return [message for message in self.connection.sent if isinstance(message, kind)]

    def say(self, *deltas):
        self.client.take(DeltaBatch(epoch=1, deltas=list(deltas)))


def params(**fields):
    return SamplingParams(**{"max_tokens": 8} | fields)


def finished(request_id, first=0):
    return Delta(request_id=request_id, first=first, token_ids=[97], finish_reason="length")


async def outcome(stream):
    """How a stream ends: the class of its error, or its finish reasons."""
    reasons = []
    try:
        async for chunk in stream:
            if chunk.finish_reason:
                reasons.append(chunk.finish_reason)
    except KvartoError as error:
        return type(error).__name__
    return reasons


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 5))


def test_a_request_that_does_not_fit_is_refused_before_anything_is_sent():
    async def check():
        world = World()
        with pytest.raises(PromptTooLongError):
            world.llm.stream("x" * 500, params())
        return world.connection.sent

    assert run(check()) == []


def test_a_request_without_a_seed_is_given_one():
    async def check():
        world = World()
        world.llm.stream("a", params())
        return world.sent(AddRequest)[0].params.seed

    assert run(check()) is not None


def test_a_seed_of_the_callers_is_kept():
    async def check():
        world = World()
        world.llm.stream("a", params(seed=5))
        return world.sent(AddRequest)[0].params.seed

    assert run(check()) == 5


def test_a_beam_search_which_draws_nothing_is_given_no_seed():
    async def check():
        world = World()
        world.llm.stream("a", params(beam_width=2))
        return world.sent(AddRequest)[0].params.seed

    assert run(check()) is None


def test_a_request_for_the_best_of_several_asks_the_head_for_logprobs():
    async def check():
        world = World()
        world.llm.stream("a", params(best_of=2))
        return world.sent(AddRequest)[0].params.logprobs

    assert run(check()) == 0


@pytest.mark.parametrize(("prompt", "options", "token_ids", "salt"), [
    ("ab", {}, [97, 98], ""), ("ab", {"cache_salt": "x"}, [97, 98], "x"),
    ({"prompt": "ab", "cache_salt": "x"}, {}, [97, 98], "x"),
    ({"prompt_token_ids": [5], "cache_salt": "x"}, {}, [5], "x"),
    ({"prompt_token_ids": [5]}, {"cache_salt": "x"}, [5], "x"),
    ({"prompt": "ab", "cache_salt": None}, {}, [97, 98], "")])
def test_a_cache_salt_given_with_the_prompt_or_beside_it_reaches_the_head(prompt, options, token_ids, salt):
    async def check():
        world = World()
        world.llm.stream(prompt, params(), **options)
        results = world.llm.generate(prompt, params(), **options)
        waiting = asyncio.create_task(anext(results))
        await asyncio.sleep(0)
        await world.llm.close()
        await asyncio.gather(waiting, return_exceptions=True)
        return [(request.prompt_token_ids, request.cache_salt) for request in world.sent(AddRequest)]

    assert run(check()) == [(token_ids, salt)] * 2


@pytest.mark.parametrize(("prompt", "options", "param"), [
    ("a", {"cache_salt": "x" * 1025}, "cache_salt"), ({"prompt": "a", "cache_salt": 5}, {}, "cache_salt"),
    ({"prompt": "a", "cache_salt": 0}, {}, "cache_salt"),
    ({"prompt": "a", "cache_salt": "x"}, {"cache_salt": "y"}, "cache_salt"),
    ({"cache_salt": "x"}, {}, "prompt"), ({"prompt": "a", "prompt_token_ids": [1], "cache_salt": "x"}, {}, "prompt"),
    ({"prompt": "a", "salt": "x"}, {}, "prompt")])
def test_a_bad_salt_or_a_mapping_that_is_no_prompt_is_refused_before_anything_is_sent(prompt, options, param):
    async def check():
        world = World()
        with pytest.raises(InvalidRequestError) as caught:
            world.llm.stream(prompt, params(), **options)
        return caught.value.param, world.connection.sent

    assert run(check()) == (param, [])


def test_generate_gives_the_best_of_several_their_rank_and_sum():
    async def check():
        world = World()
        results = world.llm.generate("a", params(best_of=2), request_id="1")
        waiting = asyncio.create_task(anext(results))
        await asyncio.sleep(0)
        for index, (token_id, logprob) in enumerate([(98, -2.0), (97, -1.0)]):
            world.say(Delta(request_id="1", seq_index=index, token_ids=[token_id], finish_reason="length", logprobs=[
                TokenLogprobs(token_id=token_id, logprob=logprob, rank=1, top_token_ids=[], top_logprobs=[])]))
        return (await waiting).outputs

    [output] = run(check())
    assert (output.index, output.text, output.cumulative_logprob, output.logprobs) == (0, "a", -1.0, None)


def test_generate_gives_beams_their_scores():
    async def check():
        world = World()
        results = world.llm.generate("a", params(n=2, beam_width=3), request_id="1")
        waiting = asyncio.create_task(anext(results))
        await asyncio.sleep(0)
        world.say(*(Delta(request_id="1", seq_index=index, token_ids=[97, 98], finish_reason="length",
                          cumulative_logprob=-2.0 - index, beam_score=-1.0 - index) for index in range(2)))
        await waiting
        return await anext(results)

    output = run(check())
    assert output.finished
    assert [(beam.text, beam.cumulative_logprob, beam.beam_score) for beam in output.outputs] == [
        ("ab", -2.0, -1.0), ("ab", -3.0, -2.0)]


def test_deltas_reach_their_own_request():
    async def check():
        world = World()
        one, two = world.llm.stream("a", params(), request_id="1"), world.llm.stream("a", params(), request_id="2")
        world.say(finished("2"), Delta(request_id="1", error=RequestError(name="UnavailableError", message="x")))
        return await outcome(one), await outcome(two)

    assert run(check()) == ("UnavailableError", ["length"])


def test_a_delta_of_an_unknown_request_is_dropped():
    async def check():
        world = World()
        world.say(finished("nobody"))

    run(check())


def test_aclose_before_the_first_chunk_cancels_at_the_head():
    async def check():
        world = World()
        await world.llm.stream("a", params(), request_id="1").aclose()
        return [(message.request_id, message.seq_index) for message in world.sent(CancelRequest)]

    assert run(check()) == [("1", None)]


def test_leaving_generate_early_cancels_at_the_head():
    async def check():
        world = World()
        results = world.llm.generate("a", params(), request_id="1")
        waiting = asyncio.create_task(anext(results))
        await asyncio.sleep(0)
        world.say(Delta(request_id="1", token_ids=[97]))
        await waiting
        await results.aclose()
        return [message.request_id for message in world.sent(CancelRequest)]

    assert run(check()) == ["1"]


def test_the_loss_of_the_head_ends_every_request_as_unavailable():
    async def check():
        world = World()
        streams = [world.llm.stream("a", params()) for _ in range(3)]
        world.client.lost("the Head is gone")
        return [await outcome(stream) for stream in streams]

    assert run(check()) == ["UnavailableError"] * 3


def test_after_the_loss_of_the_head_new_requests_are_refused_at_once():
    async def check():
        world = World()
        world.client.lost("the Head is gone")
        with pytest.raises(UnavailableError, match="the Head is gone"):
            world.llm.stream("a", params())

    run(check())


def test_a_head_that_answers_again_gets_requests_again():
    async def check():
        world = World()
        world.client.lost("the Head is gone")
        world.client.take(Pong(epoch=2))
        world.llm.stream("a", params())
        return len(world.sent(AddRequest))

    assert run(check()) == 1


def test_the_loss_of_the_head_makes_the_frontend_unready_but_alive():
    async def check():
        world = World()
        world.client.lost("the Head is gone")
        return world.llm.health()

    health = run(check())
    assert (health.live, health.ready) == (True, False)


def test_a_query_that_waits_when_the_head_is_lost_is_unavailable():
    async def check():
        world = World()
        waiting = asyncio.create_task(world.llm.status())
        await asyncio.sleep(0)
        world.client.lost("the Head is gone")
        with pytest.raises(UnavailableError):
            await waiting

    run(check())


def test_answers_find_their_questions_in_any_order():
    async def check():
        world = World()
        first, second = asyncio.create_task(world.client.query("a")), asyncio.create_task(world.client.query("b"))
        await asyncio.sleep(0)
        for query in reversed(world.sent(Query)):
            world.client.take(Reply(query_id=query.query_id, body={"of": query.what}))
        return await first, await second

    assert run(check()) == ({"of": "a"}, {"of": "b"})


def test_close_ends_every_request_as_unavailable():
    async def check():
        world = World()
        stream = world.llm.stream("a", params())
        await world.llm.close()
        return await outcome(stream)

    assert run(check()) == "UnavailableError"


def test_a_closed_frontend_refuses_requests():
    async def check():
        world = World()
        await world.llm.close()
        with pytest.raises(UnavailableError, match="closed"):
            world.llm.stream("a", params())

    run(check())


def test_an_id_that_is_in_use_is_refused():
    """The first of the two would never end otherwise."""
    async def check():
        world = World()
        world.llm.stream("a", params(), request_id="1")
        with pytest.raises(KvartoError, match="1"):
            world.llm.stream("b", params(), request_id="1")

    run(check())


def test_a_request_that_cannot_be_sent_is_not_kept():
    async def check():
        world = World()

        def refuse(message):
            raise OverflowError("can't serialize ints above 2**64")

        world.connection.send = refuse
        with pytest.raises(OverflowError):
            world.llm.stream("a", params(), priority=2**70)
        return world.llm._requests

    assert run(check()) == {}


def test_a_defect_in_one_request_costs_no_other_its_tokens():
    async def check():
        world = World()
        broken, good = world.llm.stream("a", params(), request_id="1"), world.llm.stream("a", params(), request_id="2")
        broken.take = lambda _: 1 / 0
        world.say(finished("1"), finished("2"))
        return await outcome(good), await outcome(broken)

    assert run(check()) == (["length"], "KvartoError")


@pytest.mark.parametrize("broken", ["info", "text"])
def test_a_start_that_fails_leaves_no_connection_open(monkeypatch, broken):
    connections = []

    class Inline(FakeConnection):
        @classmethod
        async def start(cls, client, config):
            connections.append(cls())
            return connections[0]

        def send(self, message):
            asyncio.get_running_loop().call_soon(client_of[0].take, Reply(
                query_id=message.query_id, body={"info": [] if broken == "info" else [vars_of(fake.make_info())]}))

    def load_text(config):
        if broken == "text":
            raise KvartoError("there is no tokenizer")
        return ByteTokenizer(), {}

    client_of = []

    class Client(EngineClient):
        def __init__(self):
            super().__init__()
            client_of.append(self)

    monkeypatch.setattr("kvarto.cluster.frontend.inline_connection.InlineConnection", Inline)
    monkeypatch.setattr(module, "EngineClient", Client)
    monkeypatch.setattr(module, "_load_text", load_text)
    with pytest.raises(KvartoError):
        run(AsyncLLM.start("m", executor="inline"))
    assert connections[0].closed


def vars_of(info):
    return {name: getattr(info, name) for name in info.__struct_fields__}


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["submit", "token", "finish", "error", "close", "lost", "pong", "stale"]), st.integers(0, 3)),
    max_size=25)


@settings(max_examples=150, deadline=None)
@given(EVENTS)
def test_every_request_has_exactly_one_end_whatever_the_order_of_events(events):
    async def play():
        world, streams, sent = World(), {}, {}
        for kind, index in events:
            name = str(index)
            if kind == "submit" and name not in world.llm._requests:
                try:
                    stream = world.llm.stream("a", params(), request_id=name)
                except UnavailableError:
                    continue
                streams.setdefault(name, []).append(stream)
                sent[name] = 0
            elif kind in ("token", "finish") and name in sent:
                world.say(Delta(
                    request_id=name, first=sent[name], token_ids=[97],
                    finish_reason="length" if kind == "finish" else None))
                sent[name] += 1
            elif kind == "stale":
                world.say(finished(name))
            elif kind == "error":
                world.say(Delta(request_id=name, error=RequestError(name="KvartoError", message="x")))
            elif kind == "close" and name in streams:
                await streams[name][-1].aclose()
            elif kind == "lost":
                world.client.lost("gone")
            elif kind == "pong":
                world.client.take(Pong(epoch=1))
        await world.llm.close()
        ends = [await outcome(stream) for several in streams.values() for stream in several]
        return ends, world.llm._requests

    ends, left = run(play())
    assert left == {}
    assert all(isinstance(end, str) or len(end) <= 1 for end in ends)
