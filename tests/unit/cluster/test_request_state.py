"""What becomes of deltas on their way to chunks, and the one end that every request has."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarto.protos.errors import KvartoError, UnavailableError
from kvarto.protos.request import Delta, RequestError

_spec = importlib.util.spec_from_file_location("request_world", Path(__file__).with_name("request_world.py"))
assert _spec and _spec.loader
world_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world_module)
Request, entry, EOS = world_module.Request, world_module.entry, world_module.EOS


# -- deltas become chunks --------------------------------------------------------------------------------------------


def test_tokens_become_text():
    request = Request()
    for char in "añb":
        request.say(char, finish_reason="length" if char == "b" else None)
    assert request.text() == "añb"


def test_a_character_in_two_deltas_is_one_character():
    request = Request()
    request.say([0xC3])
    request.say([0xB1], finish_reason="length")
    assert request.text() == "ñ"


def test_the_last_chunk_says_why():
    request = Request()
    request.say("a", finish_reason="stop", stop_reason=97)
    assert [(chunk.finish_reason, chunk.stop_reason) for chunk in request.chunks()] == [("stop", 97)]


def test_a_repeated_delta_makes_no_chunk():
    request = Request()
    request.say("a")
    request.state.take(Delta(request_id="r", first=0, token_ids=[97]))
    request.say("b", finish_reason="length")
    assert [chunk.text for chunk in request.chunks()] == ["a", "b"]


def test_of_a_delta_that_is_repeated_in_part_the_rest_counts():
    request = Request()
    request.say("ab")
    request.state.take(Delta(request_id="r", first=1, token_ids=list(b"bc"), finish_reason="length"))
    assert request.text() == "abc"


def test_logprobs_of_repeated_tokens_are_dropped_with_them():
    request = Request()
    request.say("ab")
    request.state.take(Delta(
        request_id="r", first=1, token_ids=list(b"bc"), logprobs=[entry(98), entry(99)], finish_reason="length"))
    assert [item.token_id for item in request.chunks()[-1].logprobs] == [99]


def test_a_delta_after_the_last_is_dropped():
    request = Request()
    request.say("a", finish_reason="length")
    request.say("b")
    assert request.text() == "a"


def test_tokens_that_were_lost_are_an_error():
    request = Request()
    request.say("a")
    request.state.take(Delta(request_id="r", first=5, token_ids=[97]))
    assert "lost" in str(request.chunks()[-1])


def test_a_request_with_lost_tokens_is_cancelled_at_the_head():
    request = Request()
    request.state.take(Delta(request_id="r", first=5, token_ids=[97]))
    assert request.cancelled == [("r", None)]


def test_an_error_comes_after_the_chunks_that_are_there():
    request = Request()
    request.say("a")
    request.state.take(Delta(request_id="r", error=RequestError(name="UnavailableError", message="gone")))
    chunk, error = request.chunks()
    assert (chunk.text, type(error)) == ("a", UnavailableError)


def test_an_error_keeps_its_class_across_the_wire():
    request = Request()
    sent = RequestError(name="PromptTooLongError", message="x", param="prompt")
    request.state.take(Delta(request_id="r", error=sent))
    error = request.chunks()[0]
    assert (type(error).__name__, error.param) == ("PromptTooLongError", "prompt")


def test_a_request_is_over_when_all_of_its_sequences_are():
    request = Request(n=2)
    request.say("a", 0, finish_reason="length")
    running = not request.forgotten
    request.say("b", 1, finish_reason="length")
    assert running and request.forgotten == ["r"]


# -- stop strings ----------------------------------------------------------------------------------------------------


def test_a_stop_string_across_deltas_ends_the_text_before_it():
    request = Request(stop=["END"])
    for char in "text END more":
        request.say(char)
    assert request.text() == "text "


def test_a_stop_string_cancels_only_its_sequence():
    request = Request(n=2, stop=["!"])
    request.say("a!", 1)
    assert request.cancelled == [("r", 1)]


def test_the_other_sequence_goes_on_after_a_stop_string():
    request = Request(n=2, stop=["!"])
    request.say("a!", 1)
    request.say("bc", 0, finish_reason="length")
    assert request.text(0) == "bc"


def test_a_stop_string_in_the_last_delta_needs_no_cancel():
    request = Request(stop=["!"])
    request.say("a!", finish_reason="length")
    assert request.cancelled == []


def test_a_stop_string_is_the_stop_reason():
    request = Request(stop=["!"])
    request.say("a!")
    chunk = request.chunks()[-1]
    assert (chunk.finish_reason, chunk.stop_reason) == ("stop", "!")


def test_what_might_have_begun_a_stop_string_is_given_out_at_the_end():
    request = Request(stop=["END"])
    request.say("the EN")
    request.say("X", finish_reason="length")
    assert request.text() == "the ENX"


def test_half_a_stop_string_at_the_end_is_text():
    request = Request(stop=["END"])
    request.say("the EN", finish_reason="length")
    assert request.text() == "the EN"


def test_stop_strings_do_not_count_before_min_tokens():
    request = Request(stop=["!"], min_tokens=3, max_tokens=9)
    for char in "a!b!c":
        request.say(char)
    assert request.text() == "a!b"


def test_tokens_after_a_stop_string_are_not_handed_out():
    request = Request(stop=["!"])
    request.say("a!zzz")
    assert request.chunks()[-1].token_ids == list(b"a!")


@pytest.mark.parametrize("include", [False, True])
def test_the_stop_string_is_shown_where_it_is_asked_for(include):
    request = Request(stop=["!"], include_stop_str_in_output=include)
    request.say("a!")
    assert request.text() == ("a!" if include else "a")


# -- end of sequence -------------------------------------------------------------------------------------------------


def test_the_text_of_an_end_of_sequence_is_not_shown():
    request = Request(skip_special_tokens=False)
    request.say("ab", finish_reason="stop")
    assert request.text() == "a"


def test_the_token_of_an_end_of_sequence_is_handed_out():
    request = Request()
    request.say([97, EOS], finish_reason="stop")
    assert request.chunks()[-1].token_ids == [97, EOS]


def test_without_detokenization_there_are_only_ids():
    request = Request(detokenize=False)
    request.say("ab", finish_reason="length")
    chunk = request.chunks()[0]
    assert (chunk.text, chunk.token_ids) == ("", list(b"ab"))


# -- the one end -----------------------------------------------------------------------------------------------------


def test_aclose_before_the_first_chunk_cancels():
    request = Request()
    asyncio.run(request.state.aclose())
    assert request.cancelled == [("r", None)]


def test_aclose_after_the_end_cancels_nothing():
    request = Request()
    request.say("a", finish_reason="length")
    asyncio.run(request.state.aclose())
    assert request.cancelled == []


def test_aclose_twice_cancels_once():
    request = Request()
    asyncio.run(request.state.aclose())
    asyncio.run(request.state.aclose())
    assert len(request.cancelled) == 1


def test_aclose_wakes_whoever_waits_for_a_chunk():
    request = Request()

    async def wait_and_close():
        waiting = asyncio.create_task(anext(request.state, None))
        await asyncio.sleep(0)
        await request.state.aclose()
        return await asyncio.wait_for(waiting, 1)

    assert asyncio.run(wait_and_close()) is None


EVENTS = st.one_of(
    st.tuples(st.just("say"), st.integers(0, 1), st.text("ab!", min_size=1, max_size=3)),
    st.tuples(st.just("finish"), st.integers(0, 1), st.sampled_from(["stop", "length"])),
    st.tuples(st.just("repeat"), st.integers(0, 1), st.just("")),
    st.tuples(st.just("gap"), st.integers(0, 1), st.just("")),
    st.tuples(st.just("error"), st.just(0), st.just("")),
    st.tuples(st.just("lost"), st.just(0), st.just("")),
    st.tuples(st.just("close"), st.just(0), st.just("")))


@settings(max_examples=200, deadline=None)
@given(st.lists(EVENTS, max_size=12))
def test_a_request_ends_exactly_once_whatever_the_order_of_events(events):
    request = Request(n=2, stop=["!"])
    for kind, index, value in events:
        if kind == "say":
            request.say(value, index)
        elif kind == "finish":
            request.say("z", index, finish_reason=value)
        elif kind == "repeat":
            request.state.take(Delta(request_id="r", seq_index=index, first=0, token_ids=[97]))
        elif kind == "gap":
            request.state.take(Delta(request_id="r", seq_index=index, first=10_000, token_ids=[97]))
        elif kind == "error":
            request.state.take(Delta(request_id="r", error=RequestError(name="KvartoError", message="x")))
        elif kind == "lost":
            request.state.fail(UnavailableError("gone"))
        else:
            asyncio.run(request.state.aclose())
    asyncio.run(request.state.aclose())
    items = request.chunks()
    ends = [item.index for item in items if not isinstance(item, KvartoError) and item.finish_reason]
    assert request.forgotten == ["r"]
    assert len(ends) == len(set(ends))
    assert not any(isinstance(item, KvartoError) for item in items[:-1])
