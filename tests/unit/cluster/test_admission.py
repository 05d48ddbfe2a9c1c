"""Which requests can be served at all. The engine holds 100 tokens a sequence, 10 blocks of 8, 200 token ids."""

from __future__ import annotations

import pytest

from kvarto.cluster.admission import check
from kvarto.protos.errors import InvalidRequestError, PromptTooLongError
from kvarto.protos.request import EngineInfo
from kvarto.protos.sampling import SamplingParams


def info(**changes):
    fields = dict(epoch=1, max_model_len=100, vocab_size=200, max_num_seqs=4, kv_capacity_tokens=80, block_size=8,
                  num_blocks=10, kernels="", dtype="", tp_size=1, num_groups=1)
    return EngineInfo(**(fields | changes))


def admit(num_prompt=4, *, of=None, prompt=None, **params):
    return check(prompt if prompt is not None else [1] * num_prompt, SamplingParams(**params), of or info())


def refused(kind=InvalidRequestError, **arguments):
    with pytest.raises(kind) as caught:
        admit(**arguments)
    return caught.value


def test_what_was_asked_for_is_given():
    assert admit(max_tokens=20) == 20


def test_an_empty_prompt_is_refused():
    assert refused(prompt=[]).param == "prompt"


@pytest.mark.parametrize("token_id", [-1, 200])
def test_a_token_that_is_not_in_the_vocabulary_is_refused(token_id):
    assert f"token id {token_id}" in refused(prompt=[1, token_id]).message


@pytest.mark.parametrize(("name", "value"), [("logit_bias", {200: 1.0}), ("stop_token_ids", [200])])
def test_parameters_may_name_only_tokens_of_the_vocabulary(name, value):
    assert refused(**{name: value}).param == name


def test_the_last_token_of_the_vocabulary_is_one():
    assert admit(prompt=[199]) == 16


def test_more_completions_than_sequences_in_a_step_are_refused():
    assert refused(n=5).param == "n"


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(79, 1), (40, 40), (1, 79)])
def test_what_just_fits_the_pool_is_taken(num_prompt, max_tokens):
    assert admit(num_prompt, max_tokens=max_tokens) == max_tokens


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(79, 2), (40, 41), (1, 80)])
def test_what_just_does_not_fit_the_pool_is_refused_with_what_would(num_prompt, max_tokens):
    error = refused(PromptTooLongError, num_prompt=num_prompt, max_tokens=max_tokens)
    assert (error.param, f"at most {80 - num_prompt}" in error.message) == ("max_tokens", True)


def test_a_prompt_that_fills_the_pool_is_refused():
    assert refused(PromptTooLongError, num_prompt=80).param == "prompt"


def test_a_prompt_that_fills_the_models_length_is_refused():
    assert "max_model_len is 100" in refused(PromptTooLongError, num_prompt=100, of=info(num_blocks=99)).message


def test_output_past_the_models_length_is_refused_with_what_would_fit():
    error = refused(PromptTooLongError, num_prompt=60, max_tokens=41, of=info(num_blocks=99))
    assert "at most 40" in error.message


def test_a_default_is_clamped_to_the_pool():
    assert admit(10, max_tokens=None) == 70


def test_a_default_is_clamped_to_the_models_length():
    assert admit(10, max_tokens=None, of=info(num_blocks=99)) == 90


def test_sequences_of_a_group_share_the_pool_in_whole_blocks():
    assert admit(4, n=3, max_tokens=None) == 20


def test_a_group_that_can_never_fit_is_refused():
    assert refused(PromptTooLongError, num_prompt=24, n=3).param == "prompt"


def test_tokens_at_least_that_cannot_fit_are_refused_by_name():
    assert refused(PromptTooLongError, min_tokens=90, max_tokens=None).param == "min_tokens"
