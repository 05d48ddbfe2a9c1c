"""What becomes of deltas on their way to chunks, and the one end that every request has."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvarto.cluster.frontend.request_state import RequestState
from kvarto.protos.errors import KvartoError, UnavailableError
from kvarto.protos.request import AddRequest, Delta, RequestError
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.step import TokenLogprobs

EOS = 0


class ByteTokenizer:
    """A token is a byte; token 0 ends a sequence and is special."""

    special_token_ids = frozenset({EOS})
    codec_errors = "replace"

    def token_bytes(self, token_id, *, first=False):
        return b"" if token_id == EOS else bytes([token_id])


class Request:
    """A `RequestState` whose Head is the test."""

    def __init__(self, **params):
        self.cancelled, self.forgotten = [], []
        self.state = RequestState(
            AddRequest(request_id="r", prompt_token_ids=[65], params=SamplingParams(**params)), ByteTokenizer(),
            cancel=lambda request_id, index: self.cancelled.append((request_id, index)), forget=self.forgotten.append)
        self.sent = {}

    def say(self, text, index=0, **fields):
        """The next tokens of a sequence, in one delta."""
        token_ids = list(text.encode()) if isinstance(text, str) else text
        first = self.sent.get(index, 0)
        self.sent[index] = first + len(token_ids)
        self.state.take(Delta(request_id="r", seq_index=index, first=first, token_ids=token_ids, **fields))

    def chunks(self):
        """All chunks until the end, an error as the last item."""
        async def collect():
            found = []
            try:
                async for chunk in self.state:
                    found.append(chunk)
            except KvartoError as error:
                found.append(error)
            return found

        return asyncio.run(asyncio.wait_for(collect(), 2))

    def text(self, index=0):
        return "".join(chunk.text for chunk in self.chunks() if chunk.index == index)


def entry(token_id, logprob=-1.0):
    return TokenLogprobs(token_id=token_id, logprob=logprob, rank=1, top_token_ids=[], top_logprobs=[])


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


# -- of several completions the best --------------------------------------------------------------------------------


class Ranked(Request):
    """Of `best_of` completions some."""

    def end(self, index, *tokens, reason="length", **fields):
        """A whole completion of (character, log probability)."""
        logprobs = [entry(ord(char), logprob) for char, logprob in tokens]
        self.say("".join(char for char, _ in tokens), index, logprobs=logprobs, finish_reason=reason, **fields)


def test_nothing_is_handed_out_before_the_last_of_best_of_has_ended():
    request = Ranked(best_of=2)
    request.end(0, ("a", -1.0))
    assert not request.state._chunks
    request.end(1, ("b", -2.0))
    assert [chunk.text for chunk in request.chunks()] == ["a"]


def test_the_best_by_mean_logprob_come_as_one_chunk_each_numbered_by_rank():
    request = Ranked(n=2, best_of=3)
    request.end(0, ("a", -3.0))
    request.end(1, ("b", -1.0), ("c", -2.0), ("d", -1.5))
    request.end(2, ("e", -2.0), reason="stop", stop_reason=101)
    first, second = request.chunks()
    assert (first.index, first.text, first.token_ids, first.cumulative_logprob) == (0, "bcd", list(b"bcd"), -4.5)
    assert (second.index, second.text, second.token_ids, second.cumulative_logprob) == (1, "", [101], -2.0)
    assert (second.finish_reason, second.stop_reason) == ("stop", 101)


def test_of_equally_good_completions_the_earlier_comes_first():
    request = Ranked(n=2, best_of=3)
    for index, char in ((2, "c"), (1, "b"), (0, "a")):
        request.end(index, (char, -1.0))
    assert [chunk.text for chunk in request.chunks()] == ["a", "b"]


def test_a_completion_in_many_deltas_is_ranked_as_a_whole():
    request = Ranked(best_of=2)
    request.say("x", 0, logprobs=[entry(120, -0.1)])
    request.say("y", 0, logprobs=[entry(121, -0.1)])
    request.end(1, ("a", -1.0))
    request.end(0, ("z", -4.0))
    assert [(chunk.text, chunk.cumulative_logprob) for chunk in request.chunks()] == [("a", -1.0)]


def test_tokens_after_a_stop_string_do_not_count_in_the_ranking():
    request = Ranked(best_of=2, stop=["!"])
    request.say("a!zz", 0, logprobs=[entry(0, -1.0), entry(0, -1.0), entry(0, -9.0), entry(0, -9.0)])
    request.end(1, ("b", -2.0))
    [chunk] = request.chunks()
    assert (chunk.text, chunk.stop_reason, chunk.cumulative_logprob) == ("a", "!", -2.0)
    assert request.cancelled == [("r", 0)]


@pytest.mark.parametrize(("asked", "sent", "handed_out"), [(None, 0, []), (0, 0, [97]), (3, 3, [97])])
def test_logprobs_are_sent_for_the_ranking_and_handed_out_only_where_asked_for(asked, sent, handed_out):
    request = Ranked(best_of=2, logprobs=asked)
    request.end(0, ("a", -1.0))
    request.end(1, ("b", -2.0))
    assert request.state.request.params == SamplingParams(best_of=2, logprobs=sent)
    assert [item.token_id for item in request.chunks()[0].logprobs] == handed_out


@pytest.mark.parametrize("params", [{"n": 2}, {"n": 2, "best_of": 2}, {"n": 2, "beam_width": 2}])
def test_where_none_is_left_out_what_is_sent_is_what_was_asked_for(params):
    request = Request(**params)
    assert request.state.request.params == SamplingParams(**params)


def test_best_of_as_many_as_n_streams():
    request = Request(n=2, best_of=2)
    request.say("a", 1)
    assert request.state._chunks[0].text == "a"


def test_what_a_left_out_completion_said_of_the_prompt_and_its_length_are_with_the_first_chunk():
    request = Ranked(n=2, best_of=4)
    request.end(0, ("a", -9.0), ("b", -9.0), prompt_logprobs=[entry(65)], num_cached_tokens=16)
    request.end(1, ("c", -1.0))
    request.end(2, ("d", -8.0))
    request.end(3, ("e", -2.0))
    first, second = request.chunks()
    assert (first.prompt_logprobs, first.num_cached_tokens, first.num_dropped_tokens) == ([entry(65)], 16, 3)
    assert (second.prompt_logprobs, second.num_cached_tokens, second.num_dropped_tokens) == (None, 0, 0)


def test_an_error_before_the_last_completion_ends_leaves_nothing_but_itself():
    request = Ranked(best_of=2)
    request.end(0, ("a", -1.0))
    request.state.fail(UnavailableError("gone"))
    assert [type(item) for item in request.chunks()] == [UnavailableError]


# -- beams -----------------------------------------------------------------------------------------------------------


def test_a_beam_search_ends_with_its_n_best_and_not_with_all_of_its_beams():
    request = Request(n=2, beam_width=4)
    request.say("ab", 0, finish_reason="length", cumulative_logprob=-3.0, beam_score=-1.5)
    running = not request.forgotten
    request.say([97, EOS], 1, finish_reason="stop", cumulative_logprob=-4.0, beam_score=-2.0)
    found = [(chunk.index, chunk.text, chunk.token_ids, chunk.cumulative_logprob, chunk.beam_score)
             for chunk in request.chunks()]
    assert running and request.forgotten == ["r"]
    assert found == [(0, "ab", [97, 98], -3.0, -1.5), (1, "a", [97, EOS], -4.0, -2.0)]


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
