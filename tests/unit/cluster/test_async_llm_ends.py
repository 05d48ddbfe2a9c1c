"""Every request of a frontend has one end: whether the Head is lost, the frontend closes or a request is broken."""

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
from kvarto.protos.errors import KvartoError, UnavailableError
from kvarto.protos.request import AddRequest, Delta, Pong, Reply, RequestError

_spec = importlib.util.spec_from_file_location("async_llm_world", Path(__file__).with_name("async_llm_world.py"))
assert _spec and _spec.loader
world_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world_module)
fake, World = world_module.fake, world_module.World
FakeConnection, ByteTokenizer = world_module.FakeConnection, world_module.ByteTokenizer
params, finished, outcome, run = world_module.params, world_module.finished, world_module.outcome, world_module.run


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
