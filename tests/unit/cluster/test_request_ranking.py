"""Of several completions of a request the best are handed out, numbered by rank."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kvarto.protos.errors import UnavailableError
from kvarto.protos.sampling import SamplingParams

_spec = importlib.util.spec_from_file_location("request_world", Path(__file__).with_name("request_world.py"))
assert _spec and _spec.loader
world_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world_module)
Request, entry, EOS = world_module.Request, world_module.entry, world_module.EOS


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
