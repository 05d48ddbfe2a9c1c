"""Beam search: that its results are Transformers', and each of its decisions alone."""

from __future__ import annotations

import random
from itertools import product

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvarto.cluster.scheduler.beam_search import BeamSearch, Continuation
from kvarto.protos.sampling import SamplingParams

VOCAB = 61
END, A, B, C, D, E = range(6)


# -- Transformers as the oracle --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0.3, 1.0], ids=["flat", "peaked"])
def model(request):
    """Every weight random. In float64, so that how rows are batched does not show in float32 logits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are too small to be worth a second one
    torch.manual_seed(0)
    yield LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=request.param, eos_token_id=None,
        bos_token_id=None, pad_token_id=None)).double().eval()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cases(model):
    """(prompt, end tokens, max_tokens): end tokens are such as the model says soon, and in the last case never."""
    rng = random.Random(1)
    found = []
    for num_ends, max_tokens in ((1, 1), (1, 7), (2, 24), (0, 9)):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))]
        soon = transformers_search(model, prompt, (), 10, num_beams=2)[0][0][0]
        found.append((prompt, tuple(sorted(set(rng.sample(soon, num_ends)))), max_tokens))
    return found


def transformers_search(model, prompt, eos, max_tokens, **options):
    """((token ids, score) of every beam returned, number of steps)."""
    output = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        max_new_tokens=max_tokens, eos_token_id=list(eos) or None, pad_token_id=0, return_dict_in_generate=True,
        output_scores=True, **options)
    beams = []
    for row in output.sequences[:, len(prompt):].tolist():
        end = next((place for place, token_id in enumerate(row) if token_id in eos), len(row))
        beams.append(row[:end + 1])
    return list(zip(beams, output.sequences_scores.tolist(), strict=True)), len(output.scores)


def our_search(model, prompt, eos, max_tokens, params):
    """(hypotheses, number of steps), with candidates straight from the model."""
    search, live, num_steps = BeamSearch(params, eos, max_tokens), [[]], 0
    while live:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + beam for beam in live])).logits[:, -1].float()
        top = torch.log_softmax(logits, dim=-1).topk(min(params.num_beam_candidates(eos), VOCAB))
        chosen = search.advance(list(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
        live = [[*live[one.parent], one.token_id] for one in chosen]
        num_steps += 1
    return search.results(), num_steps


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("width", [2, 4, 6])
def test_tokens_scores_and_steps_are_those_of_transformers(model, cases, width, length_penalty, early_stopping):
    for (prompt, eos, max_tokens), n in zip(cases, (width, 1, width, 2), strict=True):
        params = SamplingParams(
            n=n, beam_width=width, length_penalty=length_penalty, early_stopping=early_stopping)
        ours, num_steps = our_search(model, prompt, eos, max_tokens, params)
        expected = transformers_search(
            model, prompt, eos, max_tokens, num_beams=width, num_return_sequences=n, length_penalty=length_penalty,
            early_stopping=early_stopping)
        assert ([(beam.token_ids, beam.score) for beam in ours], num_steps) == expected


def test_the_comparison_meets_beams_that_end_in_either_way_and_searches_that_end_early(model, cases):
    reasons, early = set(), False
    for prompt, eos, max_tokens in cases:
        results, num_steps = our_search(model, prompt, eos, max_tokens, SamplingParams(n=4, beam_width=4))
        reasons |= {beam.finish_reason for beam in results}
        early |= num_steps < max_tokens
    assert (reasons, early) == ({"stop", "length"}, True)


# -- its decisions one by one ----------------------------------------------------------------------------------------


def search(width=2, *, eos=(END,), max_tokens=9, **params):
    return BeamSearch(SamplingParams(**{"n": width, "beam_width": width} | params), eos, max_tokens)


def candidates(**logprobs):
    """Of one beam, in the order given: `candidates(A=-1, END=-2)`."""
    return [globals()[name] for name in logprobs], list(logprobs.values())


def play(found, *steps):
    """The names of live beams' last tokens after each step."""
    return [[(one.parent, "_ABCDE"[one.token_id]) for one in found.advance(list(step))] for step in steps]


def texts(found):
    return ["".join("_ABCDE"[token_id] for token_id in beam.token_ids) for beam in found.results()]


def test_the_first_step_makes_beams_of_the_prompt_alone():
    found = search().advance([candidates(A=-1.0, B=-2.0, C=-3.0)])
    assert found == [Continuation(0, A, -1.0), Continuation(0, B, -2.0)]


def test_continuations_of_all_beams_compete_by_their_sums():
    assert play(search(), [candidates(A=-1.0, B=-2.0)], [
        candidates(C=-4.0, D=-5.0, E=-9.0), candidates(A=-1.0, B=-9.0)])[-1] == [(1, "A"), (0, "C")]


def test_one_beam_may_give_all_that_go_on():
    assert play(search(), [candidates(A=-1.0, B=-8.0)], [
        candidates(C=-1.0, D=-2.0), candidates(A=-0.5, B=-1.0)])[-1] == [(0, "C"), (0, "D")]


def test_equals_rank_by_beam_and_then_by_place():
    assert play(search(3), [candidates(A=-1.0, B=-1.0, C=-1.0)], [
        candidates(E=-1.0, D=-1.0), candidates(A=-1.0), candidates(B=-1.0)]) == [
        [(0, "A"), (0, "B"), (0, "C")], [(0, "E"), (0, "D"), (1, "A")]]


def test_sums_are_taken_in_float32_as_they_are_in_transformers():
    """In float64 beam 1 would be ahead by 1e-9."""
    assert play(search(), [candidates(A=-1.0, B=-1.0)], [
        candidates(C=-3.000000001), candidates(D=-3.0)])[-1] == [(0, "C"), (1, "D")]


def test_an_end_among_the_best_is_a_result_and_the_next_best_goes_on():
    assert play(search(), [candidates(END=-1.0, A=-2.0, B=-3.0)]) == [[(0, "A"), (0, "B")]]


def test_when_all_of_the_best_end_the_search_goes_on_below_them():
    assert play(search(early_stopping="never", length_penalty=2.0), [candidates(A=-1.0, B=-1.0)], [
        candidates(END=-1.0, C=-5.0), candidates(END=-1.5, D=-6.0)])[-1] == [(0, "C"), (1, "D")]


def test_an_end_below_the_best_is_dropped():
    found = search(max_tokens=2)
    play(found, [candidates(A=-1.0, B=-2.0, END=-2.5)], [candidates(C=-1.0), candidates(D=-1.0)])
    assert texts(found) == ["AC", "BD"]


def test_at_max_tokens_the_best_end_as_they_are():
    found = search(max_tokens=1)
    assert play(found, [candidates(A=-1.0, B=-2.0, C=-3.0)]) == [[]]
    assert [(beam.token_ids, beam.finish_reason) for beam in found.results()] == [([A], "length"), ([B], "length")]


def test_an_end_token_at_max_tokens_is_a_stop():
    found = search(max_tokens=1)
    play(found, [candidates(END=-1.0, A=-2.0)])
    assert [beam.finish_reason for beam in found.results()] == ["stop", "length"]


@pytest.mark.parametrize(("params", "eos", "expected"), [
    ({"stop_token_ids": [A]}, (), ("stop", A)), ({}, (A,), ("stop", None)),
    ({"ignore_eos": True}, (A,), ("length", None)), ({"stop_token_ids": [A], "ignore_eos": True}, (A,), ("stop", A))])
def test_what_ended_a_beam_is_told_as_of_any_sequence(params, eos, expected):
    found = search(eos=eos, max_tokens=1, **params)
    play(found, [candidates(A=-1.0, B=-2.0)])
    assert (found.results()[0].finish_reason, found.results()[0].stop_reason) == expected


@pytest.mark.parametrize(("length_penalty", "expected"), [(0.0, -6.0), (1.0, -3.0), (2.0, -1.5), (-1.0, -12.0)])
def test_a_score_is_the_sum_over_the_length_to_the_penalty(length_penalty, expected):
    found = search(max_tokens=2, length_penalty=length_penalty)
    play(found, [candidates(A=-2.0, B=-2.5)], [candidates(C=-4.0), candidates(D=-9.0)])
    best = found.results()[0]
    assert (best.cumulative_logprob, best.score) == (-6.0, expected)


def test_only_n_are_returned_and_the_best_first():
    found = search(3, n=2, max_tokens=1)
    play(found, [candidates(A=-1.0, B=-2.0, C=-3.0)])
    assert texts(found) == ["A", "B"]


# Two beams have ended after step 2 with scores of -1 and -1.5; the one that runs has a sum of -2.4, a score of -1.2.
HOPEFUL = [[candidates(END=-1.0, A=-1.5, B=-9.0)], [candidates(C=-0.9, END=-1.5, D=-9.0), candidates(E=-9.0)]]
# The one that runs has a sum of -4, a score of -2 as it is; with 9 tokens it might have one of -0.44.
HOPELESS = [[candidates(END=-1.0, A=-1.5, B=-9.0)], [candidates(END=-1.5, C=-2.5, D=-9.0), candidates(E=-9.0)]]


@pytest.mark.parametrize(("steps", "early_stopping", "is_over"), [
    (HOPEFUL, True, True), (HOPEFUL, False, False), (HOPEFUL, "never", False),
    (HOPELESS, True, True), (HOPELESS, False, True), (HOPELESS, "never", False)])
def test_early_stopping_decides_how_much_hope_is_enough(steps, early_stopping, is_over):
    assert (play(search(early_stopping=early_stopping), *steps)[-1] == []) is is_over


def test_a_running_beam_that_is_just_as_good_is_not_waited_for():
    steps = [candidates(A=-0.5, END=-1.0, B=-9.0)], [candidates(END=-1.5, C=-1.5), candidates(D=-9.0)]
    assert play(search(length_penalty=0.0), *steps)[-1] == []


def test_of_ended_beams_of_one_score_the_earlier_is_the_better():
    found = search(length_penalty=0.0)
    play(found, [candidates(A=-0.5, END=-1.0, B=-9.0)], [candidates(END=-0.5, C=-0.6), candidates(D=-9.0)])
    assert texts(found) == ["_", "A_"]


def test_never_gives_up_as_false_does_where_longer_beams_score_no_better():
    assert play(search(early_stopping="never", length_penalty=0.0), *HOPELESS)[-1] == []


def test_a_better_end_takes_the_place_of_the_worst():
    found = search(early_stopping="never", max_tokens=3)
    play(found, *HOPEFUL, [candidates(END=-0.1, A=-9.0), candidates(B=-9.0, C=-9.0)])
    assert texts(found) == ["AC_", "_"]


def test_with_room_for_all_sequences_the_best_of_all_are_found():
    rng = random.Random(0)
    logprobs = {text: -rng.random() for length in (1, 2, 3) for text in product((A, B, C), repeat=length)}
    found, live = search(27, max_tokens=3), [()]
    while live:
        chosen = found.advance([tuple(zip(*sorted(
            ((token_id, logprobs[*text, token_id]) for token_id in (A, B, C)), key=lambda pair: -pair[1]), strict=True))
            for text in live])
        live = [(*live[one.parent], one.token_id) for one in chosen]
    sums = {text: sum(logprobs[text[:length]] for length in (1, 2, 3)) for text in product((A, B, C), repeat=3)}
    assert [tuple(beam.token_ids) for beam in found.results()] == sorted(sums, key=sums.__getitem__, reverse=True)


def test_parameters_without_a_beam_width_are_refused():
    with pytest.raises(ValueError, match="no beam search"):
        BeamSearch(SamplingParams(), (), 5)
