"""Beam candidates of a rank, against the dense log softmax."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from kvarto.protos.sampling import SamplingParams
from kvarto.protos.step import BlockMoves

_spec = importlib.util.spec_from_file_location("rank_world", Path(__file__).with_name("rank_world.py"))
assert _spec and _spec.loader
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)
Driver, start, step, fork, of, alone = world.Driver, world.start, world.step, world.fork, world.of, world.alone
DRAWN, PROMPT, BAD_TOKEN = world.DRAWN, world.PROMPT, world.BAD_TOKEN
BEAM = SamplingParams(beam_width=3, temperature=0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return world.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def driver(model):
    return world.Driver(model[0])


def dense_logprobs(model, tokens):
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, -1].double().log_softmax(0)


def check_candidates(candidates, expected, count):
    best = expected.topk(count)
    assert candidates.token_ids == best.indices.tolist()
    assert candidates.logprobs == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("tp_size", [1, 2, 3])
def test_candidates_are_the_best_of_the_dense_log_softmax(model, tp_size):
    result = Driver(model[0], tp_size).prefill(7, [1, 2, 3], BEAM)
    (beam,) = result.beams
    assert (beam.seq_id, result.tokens) == (7, [])
    check_candidates(beam, dense_logprobs(model[1], PROMPT), 6)


def test_every_end_token_asks_for_more_candidates(driver, model):
    params = SamplingParams(beam_width=2, temperature=0.0, stop_token_ids=[5, 6, 7])
    (beam,) = driver.prefill(1, [1, 2, 3], params).beams
    check_candidates(beam, dense_logprobs(model[1], PROMPT), 2 * (1 + 4))


def test_there_are_no_more_candidates_than_tokens(driver):
    (beam,) = driver.prefill(1, [1, 2, 3], SamplingParams(beam_width=200, temperature=0.0)).beams
    assert sorted(beam.token_ids) == list(range(330))
    assert sum(torch.tensor(beam.logprobs).exp().tolist()) == pytest.approx(1.0)


def test_beams_go_on_with_the_tokens_that_the_head_chose(driver, model):
    first = driver.prefill(1, [1, 2, 3], BEAM).beams[0].token_ids
    result = driver.run(forks=[fork(2, 1, 1)], moves=[BlockMoves(copies=[(3, 4)])], steps=[
        step(1, token_ids=[first[0]]), step(2, token_ids=[first[1]], copied_block_ids=[4])])
    assert [beam.seq_id for beam in result.beams] == [1, 2]
    for beam, token in zip(result.beams, first, strict=False):
        check_candidates(beam, dense_logprobs(model[1], [*PROMPT, token]), 6)
    second = result.beams[1].token_ids[3]
    result = driver.run(forks=[fork(3, 2, 2)], ends=[1, 2], steps=[step(3, token_ids=[second])])
    check_candidates(result.beams[0], dense_logprobs(model[1], [*PROMPT, first[1], second]), 6)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_beams_and_drawn_sequences_share_a_step(model, tp_size):
    driver = Driver(model[0], tp_size)
    result = driver.run(
        starts=[start(1), start(2, BEAM), start(3, seq_index=1)],
        steps=[step(1, 20, new_block_ids=[[1, 2, 3]]), step(2, 20, new_block_ids=[[4, 5, 6]]),
               step(3, 20, new_block_ids=[[7, 8, 9]])])
    assert of(result, 1) == alone(model[0], 1, tp_size=tp_size)[0]
    assert of(result, 3) == alone(model[0], 1, seq_index=1, tp_size=tp_size)[0]
    check_candidates(result.beams[0], dense_logprobs(model[1], PROMPT), 6)


def test_a_beam_whose_prompt_is_not_computed_whole_has_no_candidates(driver):
    result = driver.run(starts=[start(1, BEAM)], steps=[step(1, 8, new_block_ids=[[1]])])
    assert result.beams == []


# ---- logits that are not numbers


@pytest.mark.parametrize("tp_size", [1, 2])
def test_rows_that_are_not_numbers_fail_and_the_others_go_on(model, tp_size):
    driver = Driver(model[0], tp_size, max_num_seqs=8)
    bad = [*PROMPT[:-1], BAD_TOKEN]
    result = driver.run(
        starts=[start(1, BEAM, tokens=bad), start(2, BEAM), start(3, tokens=bad), start(4)],
        steps=[step(seq_id, 20, new_block_ids=[[3 * seq_id, 3 * seq_id + 1, 3 * seq_id + 2]])
               for seq_id in (1, 2, 3, 4)],
        siblings=[fork(5, 3, 1), fork(6, 4, 1)])
    assert [failure.seq_id for failure in result.failures] == [1, 3, 5]
    check_candidates(result.beams[0], dense_logprobs(model[1], PROMPT), 6)
    assert [token.seq_id for token in result.tokens] == [4, 6]
    assert of(result, 4) == alone(model[0], 1, tp_size=tp_size)[0]
    assert of(result, 6) == alone(model[0], 1, seq_index=1, tp_size=tp_size)[0]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_rows_that_are_not_numbers_fail_where_all_take_the_best(model, tp_size):
    greedy = SamplingParams(temperature=0.0, max_tokens=30)

    def run(prompts):
        driver = Driver(model[0], tp_size, max_num_seqs=8)
        return driver.run(
            starts=[start(seq_id, greedy, tokens=tokens) for seq_id, tokens in prompts.items()],
            steps=[step(seq_id, 20, new_block_ids=[[3 * seq_id, 3 * seq_id + 1, 3 * seq_id + 2]])
                   for seq_id in prompts])

    bad = [*PROMPT[:-1], BAD_TOKEN]
    result = run({1: bad, 2: PROMPT, 3: bad, 4: PROMPT[::-1]})
    assert [failure.seq_id for failure in result.failures] == [1, 3]
    assert [token.seq_id for token in result.tokens] == [2, 4]
    assert result.tokens == run({2: PROMPT, 4: PROMPT[::-1]}).tokens
    logprobs = dense_logprobs(model[1], PROMPT)
    assert result.tokens[0].token_id == int(logprobs.argmax())
    assert run({1: bad}).tokens == []
