"""Every bound of the sampling parameters, and the field that its error names."""

from __future__ import annotations

import math

import msgspec
import pytest

from kvarto.protos.errors import InvalidRequestError
from kvarto.protos.sampling import MAX_LOGPROBS, SamplingParams

GOOD = [
    ("n", 1), ("n", 500), ("max_tokens", 1), ("max_tokens", None), ("min_tokens", 0), ("temperature", 0),
    ("temperature", 5.0), ("top_k", 1), ("top_p", 1), ("top_p", 1e-9), ("min_p", 0), ("min_p", 1),
    ("repetition_penalty", 1e-9), ("repetition_penalty", 9), ("presence_penalty", -2), ("presence_penalty", 2),
    ("frequency_penalty", -2), ("frequency_penalty", 2), ("seed", -(2**63)), ("seed", 2**63 - 1), ("logprobs", 0),
    ("logprobs", MAX_LOGPROBS), ("prompt_logprobs", 0), ("prompt_logprobs", MAX_LOGPROBS), ("logit_bias", {0: -100}),
    ("logit_bias", {0: 100}), ("stop_token_ids", [0]), ("stop", ["x"]), ("best_of", 1), ("best_of", 500),
    ("beam_width", 1), ("beam_width", 500), ("early_stopping", False)]
BAD = [
    ("n", 0), ("n", -1), ("max_tokens", 0), ("min_tokens", -1), ("temperature", -0.1), ("top_k", -2), ("top_p", 0),
    ("top_p", 1.01), ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0), ("repetition_penalty", -1),
    ("presence_penalty", -2.1), ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("frequency_penalty", 2.1),
    ("seed", -(2**63) - 1), ("seed", 2**63), ("logprobs", -1), ("logprobs", MAX_LOGPROBS + 1), ("prompt_logprobs", -1),
    ("prompt_logprobs", MAX_LOGPROBS + 1), ("logit_bias", {0: 100.5}), ("logit_bias", {0: -101}),
    ("logit_bias", {-1: 0}), ("logit_bias", {"5": 0}), ("stop_token_ids", [-1]), ("stop", [""]), ("stop", ["a", ""]),
    ("stop", [5]), ("best_of", 0), ("beam_width", 0), ("early_stopping", "always"), ("early_stopping", None),
    ("early_stopping", 1), ("length_penalty", -10.5), ("length_penalty", 10.5), ("length_penalty", 0.5),
    ("early_stopping", True), ("early_stopping", "never")]
NUMBERS = [
    "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "length_penalty"]
COUNTS = [
    "n", "best_of", "beam_width", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs"]


def refused(**fields):
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**fields)
    return caught.value


@pytest.mark.parametrize(("name", "value"), [
    ("length_penalty", -10), ("length_penalty", 10), ("early_stopping", True), ("early_stopping", "never")])
def test_how_beams_are_ranked_goes_with_a_beam_search(name, value):
    assert getattr(SamplingParams(beam_width=2, **{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_a_value_at_the_bound_is_taken(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_value_past_the_bound_is_refused_by_name(name, value):
    error = refused(**{name: value})
    assert (error.param, name in error.message) == (name, True)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", None, True])
def test_what_is_no_finite_number_is_refused_by_name(name, value):
    assert refused(**{name: value}).param == name


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [1.5, "1", True])
def test_what_is_no_integer_is_refused_by_name(name, value):
    assert refused(**{name: value}).param == name


@pytest.mark.parametrize("name", ["n", "min_tokens"])
def test_a_count_that_must_be_there_is_refused_by_name_when_it_is_none(name):
    assert refused(**{name: None}).param == name


@pytest.mark.parametrize("name", ["stop", "stop_token_ids", "logit_bias"])
def test_none_means_no_entries_as_it_does_in_vllm(name):
    assert not getattr(SamplingParams(**{name: None}), name)


@pytest.mark.parametrize("value", [0, -1])
def test_no_top_k_can_be_said_as_vllm_says_it(value):
    assert SamplingParams(top_k=value).top_k is None


def test_one_stop_string_may_be_given_bare():
    assert SamplingParams(stop="END").stop == ["END"]


def test_more_tokens_at_least_than_at_most_are_refused():
    assert refused(min_tokens=5, max_tokens=4).param == "min_tokens"


def test_min_tokens_may_equal_max_tokens():
    assert SamplingParams(min_tokens=4, max_tokens=4).min_tokens == 4


def test_stop_strings_without_text_are_refused():
    assert refused(stop=["x"], detokenize=False).param == "stop"


def test_an_unknown_field_is_refused():
    with pytest.raises(TypeError):
        SamplingParams(best_off=3)


def test_fewer_completions_than_are_returned_are_refused():
    assert refused(n=3, best_of=2).param == "best_of"


def test_more_beams_returned_than_searched_are_refused():
    assert refused(n=3, beam_width=2).param == "n"


@pytest.mark.parametrize(("name", "value"), [
    ("best_of", 2), ("temperature", 0.5), ("top_k", 5), ("top_p", 0.5), ("min_p", 0.5), ("repetition_penalty", 1.1),
    ("presence_penalty", 1.0), ("frequency_penalty", 1.0), ("logit_bias", {5: 1.0}), ("stop", ["x"]), ("min_tokens", 1),
    ("logprobs", 0), ("prompt_logprobs", 0)])
def test_what_a_beam_search_would_ignore_is_refused_by_name(name, value):
    assert refused(beam_width=2, **{name: value}).param == name


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_beam_search_may_name_either_temperature_that_changes_no_logits(temperature):
    assert SamplingParams(beam_width=2, temperature=temperature).beam_width == 2


@pytest.mark.parametrize(("params", "expected"), [
    ({}, 1), ({"n": 3}, 3), ({"n": 2, "best_of": 5}, 5), ({"n": 2, "beam_width": 4}, 4)])
def test_sequences_at_one_time(params, expected):
    assert SamplingParams(**params).num_sequences == expected


@pytest.mark.parametrize(("params", "expected"), [
    ({}, {7, 8}), ({"stop_token_ids": [3, 7]}, {3, 7, 8}), ({"ignore_eos": True}, set()),
    ({"ignore_eos": True, "stop_token_ids": [3]}, {3})])
def test_beams_end_with_the_models_end_tokens_and_the_requests(params, expected):
    assert SamplingParams(beam_width=2, **params).beam_end_tokens((7, 8)) == expected


@pytest.mark.parametrize(("params", "eos", "expected"), [
    ({}, (7,), 0), ({"beam_width": 3}, (), 6), ({"beam_width": 3}, (7,), 6), ({"beam_width": 3}, (7, 8), 9),
    ({"beam_width": 3, "stop_token_ids": [8]}, (7, 8), 9)])
def test_candidates_leave_enough_beams_when_the_best_of_them_end(params, eos, expected):
    assert SamplingParams(**params).num_beam_candidates(eos) == expected


def test_parameters_survive_the_wire():
    params = SamplingParams(n=3, best_of=4, stop="x", logit_bias={5: 1.5}, seed=-7, top_k=-1, min_p=0.5)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_parameters_of_a_beam_search_survive_the_wire(early_stopping):
    params = SamplingParams(beam_width=3, length_penalty=-0.5, early_stopping=early_stopping)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_only_differences_cross_the_wire():
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(SamplingParams(n=2))) == {"n": 2}


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (0.0, True), (0.1, False)])
def test_greedy_is_a_temperature_of_zero(temperature, greedy):
    assert SamplingParams(temperature=temperature).greedy is greedy
