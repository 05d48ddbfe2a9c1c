"""Minimum length, bias and penalties, against transformers' processors and dense formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

from kvarto.protos.errors import InvalidRequestError
from kvarto.protos.sampling import SamplingParams
from kvarto.worker.sampling.counts import TokenCounts
from kvarto.worker.sampling.edits import apply_edits
from kvarto.worker.sampling.state import SamplingState

VOCAB = 97
EOS = 5


def make_state(token_ids, num_prompt_tokens, *, start=0, size=VOCAB, **params):
    return SamplingState(SamplingParams(temperature=0.0, max_tokens=100, **params), seq_index=0, token_ids=token_ids,
                         num_prompt_tokens=num_prompt_tokens, eos_token_ids=[EOS], vocab_start=start, local_vocab=size)


def random_rows(rows, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, VOCAB, generator=generator) * 3
    return logits, torch.randint(0, VOCAB, (rows, 40), generator=generator).tolist()


def edited(logits, states):
    logits = logits.clone()
    apply_edits(logits, states)
    return logits


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_is_that_of_transformers(penalty):
    logits, tokens = random_rows(4)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor(tokens), logits.clone())
    actual = edited(logits, [make_state(ids, 30, repetition_penalty=penalty) for ids in tokens])
    torch.testing.assert_close(actual, expected)


def test_presence_and_frequency_penalties_count_the_output_only():
    logits, tokens = random_rows(4)
    expected = logits.clone()
    for row, ids in enumerate(tokens):
        counts = torch.bincount(torch.tensor(ids[25:]), minlength=VOCAB)
        expected[row] -= 0.7 * counts + 0.4 * (counts > 0)
    actual = edited(logits, [make_state(ids, 25, presence_penalty=0.4, frequency_penalty=0.7) for ids in tokens])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("num_output", "masked"), [(3, True), (4, False)])
def test_min_tokens_masks_ends_as_transformers_does(num_output, masked):
    logits, tokens = random_rows(1)
    ids = tokens[0][:20 + num_output]
    processor = MinNewTokensLengthLogitsProcessor(20, 4, [EOS, 17], device="cpu")
    expected = processor(torch.tensor([ids]), logits.clone())
    actual = edited(logits, [make_state(ids, 20, min_tokens=4, stop_token_ids=[17])])
    assert torch.equal(actual, expected)
    assert torch.isinf(actual[0, 17]).item() is masked


def test_bias_is_added_before_the_repetition_penalty():
    logits = torch.zeros(1, VOCAB)
    actual = edited(logits, [make_state([8, 9], 1, logit_bias={8: 4.0, 11: -6.0}, repetition_penalty=2.0)])
    expected = torch.zeros(1, VOCAB)
    expected[0, 8], expected[0, 11] = 2.0, -6.0
    assert torch.equal(actual, expected)


def test_rows_that_ask_for_nothing_are_not_touched():
    logits, tokens = random_rows(3)
    states = [make_state(tokens[0], 30), make_state(tokens[1], 30, repetition_penalty=2.0), make_state(tokens[2], 30)]
    actual = edited(logits, states)
    assert torch.equal(actual[[0, 2]], logits[[0, 2]])


def test_slices_of_the_vocabulary_are_edited_as_the_whole_is():
    logits, tokens = random_rows(5)
    params = {"repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1, "min_tokens": 50,
                  "logit_bias": {1: 3.0, 60: -2.0, 96: 9.0}}
    whole = edited(logits, [make_state(ids, 20, **params) for ids in tokens])
    for start, end in [(0, 33), (33, 34), (34, VOCAB)]:
        part = edited(logits[:, start:end],
                      [make_state(ids, 20, start=start, size=end - start, **params) for ids in tokens])
        assert torch.equal(part, whole[:, start:end])


def test_a_masked_nan_stays_visible():
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS] = torch.nan
    assert torch.isnan(edited(logits, [make_state([1], 1, min_tokens=2)])[0, EOS])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 300), max_size=150), st.integers(0, 150), st.integers(0, 150), st.booleans())
def test_counts_kept_token_by_token_are_those_of_the_whole_sequence(tokens, num_prompt, num_known, with_prompt):
    num_prompt = min(num_prompt, len(tokens))
    num_known = max(num_prompt, min(num_known, len(tokens)))
    counts = TokenCounts(tokens[:num_known], num_prompt, with_prompt=with_prompt, vocab_start=100, local_vocab=101)
    for token in tokens[num_known:]:
        counts.append(token)
    held = tokens if with_prompt else tokens[num_prompt:]
    expected = {t - 100: tokens[num_prompt:].count(t) for t in held if 100 <= t <= 200}
    assert dict(zip(counts.columns.tolist(), counts.counts.tolist(), strict=True)) == expected


def test_appending_to_a_long_sequence_replaces_no_array():
    counts = TokenCounts(list(range(1000)), 0, with_prompt=True, vocab_start=0, local_vocab=5000)
    before = counts.columns
    counts.append(1500)
    assert np.shares_memory(before, counts.columns)


def test_random_sampling_without_a_seed_is_refused():
    with pytest.raises(InvalidRequestError, match="seed"):
        SamplingState(SamplingParams(temperature=1.0), seq_index=0, token_ids=[1], num_prompt_tokens=1,
                      eos_token_ids=[], vocab_start=0, local_vocab=4)
