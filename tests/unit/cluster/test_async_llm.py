"""The frontend that owns requests, with a connection whose other end is the test."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import pytest

from kvarto.protos.errors import InvalidRequestError, KvartoError, PromptTooLongError
from kvarto.protos.request import AddRequest, CancelRequest, Delta, Query, Reply, RequestError
from kvarto.protos.step import TokenLogprobs

_spec = importlib.util.spec_from_file_location("async_llm_world", Path(__file__).with_name("async_llm_world.py"))
assert _spec and _spec.loader
world_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world_module)
World = world_module.World
params, finished, outcome, run = world_module.params, world_module.finished, world_module.outcome, world_module.run


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


def test_answers_find_their_questions_in_any_order():
    async def check():
        world = World()
        first, second = asyncio.create_task(world.client.query("a")), asyncio.create_task(world.client.query("b"))
        await asyncio.sleep(0)
        for query in reversed(world.sent(Query)):
            world.client.take(Reply(query_id=query.query_id, body={"of": query.what}))
        return await first, await second

    assert run(check()) == ({"of": "a"}, {"of": "b"})


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
