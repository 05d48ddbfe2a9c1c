"""A rank told to move, to fork and to compute; what it says of itself."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvarto.cluster.engine.transport import GroupFailedError
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.step import BlockMoves, RankCosts
from kvarto.worker.rank import Rank

_spec = importlib.util.spec_from_file_location("rank_world", Path(__file__).with_name("rank_world.py"))
assert _spec and _spec.loader
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)
Driver, start, step, fork, of, alone = world.Driver, world.start, world.step, world.fork, world.of, world.alone
DRAWN, PROMPT, BAD_TOKEN, NUM_BLOCKS = world.DRAWN, world.PROMPT, world.BAD_TOKEN, world.NUM_BLOCKS
COSTS = RankCosts(copy_bytes_per_s=1.0, prefill_tokens_per_s=1.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return world.make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def driver(model):
    return world.Driver(model[0])


# ---- moves


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_sequence_swapped_out_and_in_goes_on_bit_for_bit(model, tp_size):
    driver = Driver(model[0], tp_size)
    expected = alone(model[0], 4, tp_size=tp_size)
    gained = [of(driver.prefill(1, [1, 2, 3]), 1), of(driver.run(steps=[step(1)]), 1)]
    known = PROMPT + [token_id for token_id, _ in gained]
    driver.run(moves=[BlockMoves(swap_outs=[(1, 9), (2, 8), (3, 7)])], ends=[1])
    driver.prefill(2, [1, 2, 3], tokens=PROMPT[::-1])
    result = driver.run(moves=[BlockMoves(swap_ins=[(9, 4), (8, 11), (7, 6)])],
                        starts=[start(1, tokens=known, computed=len(known) - 1)],
                        steps=[step(1, new_block_ids=[[4, 11, 6]])])
    gained += [of(result, 1), of(driver.run(steps=[step(1)]), 1)]
    assert gained == expected


def test_a_plan_of_moves_alone_is_answered(driver):
    result = driver.run(moves=[BlockMoves(swap_outs=[(1, 1)])])
    assert (result.step_id, result.tokens, result.failed_loads) == (0, [], [])
    assert 0 < result.move_seconds <= result.seconds


def test_a_plan_without_moves_spends_no_time_on_them(driver):
    assert driver.prefill(1, [1, 2, 3]).move_seconds == 0


def test_moves_come_before_the_step_that_reads_the_blocks(driver, model):
    expected = alone(model[0], 2)
    first = of(driver.prefill(1, [1, 2, 3]), 1)
    second = driver.run(
        moves=[BlockMoves(swap_outs=[(1, 1), (2, 2), (3, 3)], swap_ins=[(1, 3), (2, 2), (3, 1)])], ends=[1],
        starts=[start(4, tokens=[*PROMPT, first[0]], computed=20)], steps=[step(4, new_block_ids=[[3, 2, 1]])])
    assert [first, of(second, 4)] == expected


# ---- forks, copies and siblings


def test_a_fork_writes_into_its_copy_and_its_parent_in_place(driver, model):
    gained = {1: [of(driver.prefill(1, [1, 2, 3]), 1)]}
    driver.run(forks=[fork(2, 1, 1)], moves=[BlockMoves(copies=[(3, 4)])],
               steps=[step(1), step(2, copied_block_ids=[4])])
    results = [driver.run(steps=[step(2), step(1)]) for _ in range(3)]
    # The fork has its parent's first token and then draws as sequence 1 of its group.
    known = [*PROMPT, gained[1][0][0]]
    other = Driver(model[0])
    expected = [of(other.run(starts=[start(9, seq_index=1, tokens=known)],
                             steps=[step(9, 21, new_block_ids=[[1, 2, 3]])]), 9)]
    expected += [of(other.run(steps=[step(9)]), 9) for _ in range(3)]
    assert [of(result, 2)[0] for result in results] == [token_id for token_id, _ in expected[1:]]
    assert [of(result, 1) for result in results] == alone(model[0], 5)[2:]


def test_a_step_may_bring_the_table_and_a_copy(driver, model):
    driver.prefill(1, [1, 2, 3])
    first = of(driver.prefill(2, [4, 5, 6]), 2)
    driver.run(ends=[2])
    result = driver.run(moves=[BlockMoves(copies=[(6, 7)])],
                        starts=[start(3, tokens=[*PROMPT, first[0]], computed=20)],
                        steps=[step(3, new_block_ids=[[4, 5, 6]], copied_block_ids=[7])])
    assert of(result, 3) == alone(model[0], 2)[1]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_siblings_sample_as_if_each_had_been_prefilled(model, tp_size):
    driver = Driver(model[0], tp_size)
    result = driver.run(starts=[start(1)], steps=[step(1, 20, new_block_ids=[[1, 2, 3]])],
                        siblings=[fork(2, 1, 1), fork(3, 1, 2)])
    assert [token.seq_id for token in result.tokens] == [1, 2, 3]
    for seq_id in (1, 2, 3):
        assert of(result, seq_id) == alone(model[0], 1, seq_index=seq_id - 1, tp_size=tp_size)[0]
    assert len({of(result, seq_id)[0] for seq_id in (1, 2, 3)}) > 1


def test_siblings_go_on_as_if_each_had_been_prefilled(driver, model):
    gained = {1: [], 2: []}
    results = [driver.run(starts=[start(1)], steps=[step(1, 20, new_block_ids=[[1, 2, 3]])],
                          siblings=[fork(2, 1, 1)]),
               driver.run(moves=[BlockMoves(copies=[(3, 4)])], steps=[step(2, copied_block_ids=[4]), step(1)])]
    results += [driver.run(steps=[step(1), step(2)]) for _ in range(3)]
    for seq_id in gained:
        tokens = [of(result, seq_id)[0] for result in results]
        assert tokens == [token_id for token_id, _ in alone(model[0], 5, seq_index=seq_id - 1)]


def test_prompt_log_probabilities_are_the_parents_alone(driver):
    params = SamplingParams(seed=1, prompt_logprobs=2)
    result = driver.run(starts=[start(1, params)], steps=[step(1, 20, new_block_ids=[[1, 2, 3]])],
                        siblings=[fork(2, 1, 1)])
    assert [(part.seq_id, part.first, len(part.positions)) for part in result.prompt_logprobs] == [(1, 1, 19)]


def test_forks_find_rows_before_ends_give_theirs_back(driver):
    for seq_id in (1, 2, 3):
        driver.prefill(seq_id, [3 * seq_id, 3 * seq_id + 1, 3 * seq_id + 2])
    driver.run(forks=[fork(4, 1, 1), fork(5, 1, 2), fork(6, 2, 1)], ends=[1, 2, 3])
    driver.run(ends=[4, 5, 6])


def test_a_sibling_of_a_sequence_that_does_not_sample_is_refused(driver):
    with pytest.raises(GroupFailedError, match=r"siblings \[2\]"):
        driver.run(starts=[start(1)], steps=[step(1, 8, new_block_ids=[[1]])], siblings=[fork(2, 1, 1)])


# ---- what a rank says of itself


def test_without_a_disk_there_are_no_stored_keys(driver):
    ready = driver.ranks[0].ready(COSTS)
    assert (ready.stored_keys, ready.costs) == ([], COSTS)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_ranks_measure_together_and_find_their_costs(model, tp_size):
    ranks = Driver(model[0], tp_size).ranks
    with ThreadPoolExecutor(tp_size) as pool:
        found = list(pool.map(Rank.measure, ranks))
    assert all(costs.copy_bytes_per_s > 1e6 and costs.prefill_tokens_per_s > 1 for costs in found)


def test_pools_of_no_host_blocks_are_possible(model):
    assert Driver(model[0], num_host_blocks=0).prefill(1, [1, 2, 3]).tokens
