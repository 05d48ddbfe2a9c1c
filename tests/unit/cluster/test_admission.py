"""Which requests can be served at all. The engine holds 100 tokens a sequence, 10 blocks of 8, 200 token ids."""

from __future__ import annotations

import pytest

from kvarto.cluster.admission import MAX_CACHE_SALT, check, check_cache_salt
from kvarto.protos.errors import InvalidRequestError, PromptTooLongError
from kvarto.protos.request import EngineInfo, KVPool
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.sparsity import KVSparsity


def info(**changes):
    fields = dict(epoch=1, max_model_len=100, vocab_size=200, max_num_seqs=4, kv_capacity_tokens=80, block_size=8,
                  max_num_batched_tokens=40, kv_pools=[KVPool(num_blocks=10)], num_host_blocks=0, kernels="", dtype="",
                  kv_cache_dtype="", tp_size=1, num_groups=1)
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


@pytest.mark.parametrize(("params", "param"), [
    ({"n": 5}, "n"), ({"n": 2, "best_of": 5}, "best_of"), ({"n": 2, "beam_width": 5}, "beam_width")])
def test_more_sequences_than_a_step_has_are_refused_by_what_asks_for_them(params, param):
    error = refused(**params)
    assert (error.param, error.message) == (param, f"{param} (5) is above max_num_seqs (4)")


@pytest.mark.parametrize("params", [{"n": 4}, {"n": 2, "best_of": 4}, {"n": 2, "beam_width": 4}])
def test_as_many_sequences_as_a_step_has_are_taken(params):
    assert admit(max_tokens=4, **params) == 4


def test_more_beams_than_tokens_to_begin_them_with_are_refused():
    assert refused(beam_width=3, prompt=[1], of=info(vocab_size=2)).param == "beam_width"


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
    error = refused(PromptTooLongError, num_prompt=100, of=info(kv_pools=[KVPool(num_blocks=99)]))
    assert "max_model_len is 100" in error.message


def test_output_past_the_models_length_is_refused_with_what_would_fit():
    error = refused(PromptTooLongError, num_prompt=60, max_tokens=41, of=info(kv_pools=[KVPool(num_blocks=99)]))
    assert "at most 40" in error.message


def test_a_default_is_clamped_to_the_pool():
    assert admit(10, max_tokens=None) == 70


def test_a_default_is_clamped_to_the_models_length():
    assert admit(10, max_tokens=None, of=info(kv_pools=[KVPool(num_blocks=99)])) == 90


@pytest.mark.parametrize("params", [{"n": 3}, {"n": 2, "best_of": 3}, {"n": 2, "beam_width": 3}])
def test_sequences_of_a_group_divide_the_pool_into_whole_blocks(params):
    """A prompt of less than a block is not shared: 3 of 10 blocks each."""
    assert admit(4, max_tokens=None, **params) == 3 * 8 - 4


@pytest.mark.parametrize(("num_prompt", "blocks_each"), [(8, 3), (15, 3), (16, 2), (40, 1), (47, 1), (56, 1)])
def test_full_blocks_of_the_prompt_are_there_once(num_prompt, blocks_each):
    """Of 10 blocks the prompt's full ones come off first; the others are divided by 3."""
    assert admit(num_prompt, n=3, max_tokens=None) == (num_prompt // 8 + blocks_each) * 8 - num_prompt


@pytest.mark.parametrize(("num_prompt", "n"), [(1, 4), (8, 4), (24, 3), (47, 2), (63, 1), (63, 2), (55, 3)])
def test_what_is_taken_has_blocks_for_every_token_of_every_sequence(num_prompt, n):
    """Counted slot by slot; one token more has none."""

    def num_blocks(num_tokens):
        return len({(None if slot < num_prompt // 8 * 8 else sequence, slot // 8)
                    for sequence in range(n) for slot in range(num_tokens)})

    longest = max(total for total in range(101) if num_blocks(total) <= 10)
    assert admit(num_prompt, n=n, max_tokens=None) == longest - num_prompt
    assert admit(num_prompt, n=n, max_tokens=longest - num_prompt) == longest - num_prompt
    error = refused(PromptTooLongError, num_prompt=num_prompt, n=n, max_tokens=longest - num_prompt + 1)
    assert (error.param, f"at most {longest - num_prompt}" in error.message) == ("max_tokens", True)


@pytest.mark.parametrize(("params", "name"), [
    ({"n": 4}, "n"), ({"n": 2, "best_of": 4}, "best_of"), ({"beam_width": 4}, "beam_width")])
def test_a_group_that_can_never_fit_is_refused_by_what_makes_it_large(params, name):
    """7 blocks are the prompt's, and 3 are no whole one for each of 4."""
    error = refused(PromptTooLongError, num_prompt=56, **params)
    assert (error.param, f"{name}=4 sequences" in error.message) == ("prompt", True)


def test_tokens_at_least_that_cannot_fit_are_refused_by_name():
    assert refused(PromptTooLongError, min_tokens=90, max_tokens=None).param == "min_tokens"


@pytest.mark.parametrize("salt", ["", "tenant 7", "ä" * MAX_CACHE_SALT])
def test_a_cache_salt_is_any_text_of_some_length(salt):
    check_cache_salt(salt)


@pytest.mark.parametrize("salt", ["x" * (MAX_CACHE_SALT + 1), 7, None, b"x", "\ud800"])
def test_what_is_no_such_text_is_refused_as_a_salt(salt):
    with pytest.raises(InvalidRequestError) as caught:
        check_cache_salt(salt)
    assert caught.value.param == "cache_salt"


# -- pools with a window ---------------------------------------------------------------------------------------------


def pools(*kv_pools, max_model_len=1000, **changes):
    return info(kv_pools=list(kv_pools), max_model_len=max_model_len, **changes)


def sliding(num_blocks, window=20, num_sinks=0):
    return KVPool(num_blocks=num_blocks, window=window, num_sinks=num_sinks)


@pytest.mark.parametrize(
    ("window", "num_sinks", "enough"), [(20, 0, 10), (20, 3, 11), (8, 0, 8), (9, 0, 9), (20, 9, 12)])
def test_a_pool_with_room_for_window_sinks_and_chunk_bounds_no_length(window, num_sinks, enough):
    """A chunk of 40 tokens takes 5 blocks, and 2 more are for what begins and ends within a block."""
    assert admit(max_tokens=None, of=pools(sliding(enough, window, num_sinks))) == 996
    assert admit(max_tokens=None, of=pools(sliding(enough - 1, window, num_sinks))) == (enough - 1) * 8 - 4


@pytest.mark.parametrize("params", [{"n": 3}, {"n": 2, "best_of": 3}, {"n": 2, "beam_width": 3}])
def test_every_sequence_of_a_group_has_a_window_of_its_own(params):
    assert admit(max_tokens=None, of=pools(sliding(3 * 5 + 5)), **params) == 996
    assert admit(max_tokens=None, of=pools(sliding(3 * 5 + 4)), **params) == 6 * 8 - 4


def test_beside_a_window_sequences_have_room_for_a_prompt_each():
    """Those that are computed again find the prompt's blocks of the other group, but not what the window has passed."""
    assert admit(32, max_tokens=None, n=3, of=pools(KVPool(num_blocks=18))) == 8 * 8 - 32
    assert admit(32, max_tokens=None, n=3, of=pools(KVPool(num_blocks=18), sliding(100))) == 6 * 8 - 32


def test_the_tightest_pool_decides():
    of = pools(KVPool(num_blocks=50), sliding(10))
    assert admit(max_tokens=396, of=of) == 396
    error = refused(PromptTooLongError, max_tokens=397, of=of)
    assert (error.param, "at most 396" in error.message) == ("max_tokens", True)
    assert admit(max_tokens=None, of=pools(KVPool(num_blocks=50), sliding(9))) == 68


def sparse(policy, **changes):
    """16 rows (2 blocks) are kept, and 8 more may be gained: 3 blocks, and 2 fresh ones for a compaction."""
    return info(kv_sparsity=KVSparsity(policy=policy, budget=16, interval=8), **changes)


@pytest.mark.parametrize("policy", ["h2o", "tova"])
@pytest.mark.parametrize(("num_prompt", "num_blocks"), [(1, 5), (16, 5), (24, 5), (25, 6), (40, 7), (41, 8)])
def test_rows_that_are_dropped_bound_no_output(policy, num_prompt, num_blocks):
    """The prompt is held whole, or three blocks, and two fresh ones beside them."""
    assert admit(num_prompt, max_tokens=100 - num_prompt, of=sparse(policy, kv_pools=[KVPool(num_blocks=num_blocks)]))


@pytest.mark.parametrize("policy", ["h2o", "tova"])
def test_a_pool_too_small_to_compact_in_takes_what_ends_before_that(policy):
    pool = sparse(policy, kv_pools=[KVPool(num_blocks=4)])
    # The last token is never computed: 23 rows.
    assert admit(10, max_tokens=None, of=pool) == 14
    assert refused(PromptTooLongError, num_prompt=10, max_tokens=15, of=pool).param == "max_tokens"


@pytest.mark.parametrize("policy", ["h2o", "snapkv", "tova"])
def test_a_prompt_that_leaves_no_room_for_the_rows_that_it_keeps_is_refused(policy):
    pool = sparse(policy, kv_pools=[KVPool(num_blocks=4)])
    assert refused(PromptTooLongError, num_prompt=17, max_tokens=1, of=pool).param == "prompt"


@pytest.mark.parametrize("policy", ["h2o", "tova"])
def test_sequences_that_drop_rows_share_nothing(policy):
    """Three times three blocks and two fresh ones; the prompt of one of them may be longer."""
    assert admit(24, n=3, max_tokens=76, of=sparse(policy, kv_pools=[KVPool(num_blocks=15)]))
    assert admit(25, n=3, max_tokens=75, of=sparse(policy, kv_pools=[KVPool(num_blocks=16)]))
    assert admit(25, n=3, max_tokens=None, of=sparse(policy, kv_pools=[KVPool(num_blocks=15)])) < 75


def test_with_snapkv_output_counts_and_the_prompt_counts_as_what_it_keeps():
    """Of 10 blocks; 40 tokens of prompt are 16 rows."""
    assert admit(40, max_tokens=None, of=sparse("snapkv")) == 100 - 40
    assert admit(60, max_tokens=None, of=sparse("snapkv", max_model_len=999)) == 80 - 16


def test_with_snapkv_a_short_prompt_is_as_any_other():
    assert admit(10, max_tokens=None, of=sparse("snapkv")) == admit(10, max_tokens=None) == 70


def test_sequences_that_h2o_computes_again_do_not_share_their_prompt():
    """Of 9 blocks, too few to compact three sequences: the prompt's full block is not there once, but three times."""
    pool = dict(kv_pools=[KVPool(num_blocks=8)])
    assert admit(8, n=3, max_tokens=None, of=sparse("h2o", **pool)) == 2 * 8 - 8
    assert admit(8, n=3, max_tokens=None, of=sparse("tova", **pool)) == 3 * 8 - 8
