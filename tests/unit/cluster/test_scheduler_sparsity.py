"""The scheduler with KV sparsity: when sequences are compacted, who gives blocks up for it, and that tokens stay.

Blocks hold 8 tokens; 16 rows are kept and 8 may be gained unless a test says otherwise.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kvarto.cluster.engine.accounting import Accounting
from kvarto.protos.sparsity import KVSparsity

_spec = importlib.util.spec_from_file_location("scheduler_world", Path(__file__).with_name("scheduler_world.py"))
assert _spec and _spec.loader
world_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world_module)
World, prompt_of, check_tokens = world_module.World, world_module.prompt_of, world_module.check_tokens

POLICIES = pytest.mark.parametrize("policy", ["h2o", "snapkv", "tova"])
DEPTHS = pytest.mark.parametrize("depth", [1, 2])


def sparse(policy="tova", *, budget=16, interval=8, window=1, num_blocks=100, step_budget=64, **options):
    spec = KVSparsity(policy=policy, budget=budget, interval=interval, window=window)
    return World(num_blocks, step_budget, space={"sparsity": spec}, **options)


def compactions(world):
    """(name, tokens of the step, rows kept) of each, in order."""
    return [(world.names[step.seq_id], step.num_tokens, step.compaction.num_kept)
            for plan in world.plans for step in plan.steps if step.compaction]


def compacted_at(world, name="a"):
    """Lengths at which a sequence was compacted."""
    computed, lengths = 0, []
    for plan in world.plans:
        for step in plan.steps:
            if world.names[step.seq_id] == name:
                computed += step.num_tokens
                lengths += [computed] if step.compaction else []
    return lengths


# -- when ------------------------------------------------------------------------------------------------------------


@DEPTHS
@pytest.mark.parametrize(("policy", "lengths"), [
    ("h2o", [30, 38, 46, 54]), ("tova", [30, 38, 46, 54]), ("snapkv", [30])])
def test_a_long_prompt_is_compacted_at_its_end_and_output_at_every_interval(policy, lengths, depth):
    world = sparse(policy)
    world.add("a", length=30, max_tokens=30)
    world.finish(depth)
    assert compacted_at(world) == lengths
    check_tokens(world)


@pytest.mark.parametrize(("policy", "lengths"), [("h2o", [24, 32]), ("tova", [24, 32]), ("snapkv", [])])
def test_a_prompt_within_the_budget_is_compacted_when_its_output_fills_the_interval(policy, lengths):
    world = sparse(policy)
    world.add("a", length=16, max_tokens=20)
    world.finish()
    assert compacted_at(world) == lengths
    check_tokens(world)


def test_no_prompt_is_compacted_in_the_middle():
    world = sparse(step_budget=10)
    world.add("a", length=45, max_tokens=2)
    world.finish()
    assert compacted_at(world) == [45]


@pytest.mark.parametrize("policy", ["h2o", "tova"])
def test_an_endless_sequence_holds_a_bounded_number_of_blocks(policy):
    world = sparse(policy, num_blocks=5)
    world.add("a", length=20, max_tokens=300)
    world.finish()
    assert len(compacted_at(world)) > 30
    check_tokens(world)


@pytest.mark.parametrize("step_budget", [5, 11, 13, 40])
def test_the_queries_that_score_a_prompt_are_computed_in_one_step(step_budget):
    world = sparse("snapkv", window=4, step_budget=step_budget)
    world.add("a", length=33, max_tokens=2)
    world.finish()
    (_, num_tokens, _), = compactions(world)
    assert num_tokens >= 4


@POLICIES
def test_a_last_chunk_waits_for_a_step_that_holds_it(policy):
    """With others decoding, and prompts that are older."""
    world = sparse(policy, window=4 if policy == "snapkv" else 1, step_budget=8, max_num_seqs=5)
    for name in "abcde":
        world.add(name, length=26, max_tokens=12)
    world.finish()
    check_tokens(world)


# -- sharing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "cached"), [("tova", 32), ("snapkv", 24), ("h2o", 0)])
def test_prompts_share_what_does_not_score_them(policy, cached):
    world = sparse(policy, window=9 if policy == "snapkv" else 1, caching=True)
    for name in "ab":
        world.add(name, prompt=prompt_of(40, 3), max_tokens=3)
        world.finish()
    assert [world.cached(name)[0] for name in "ab"] == [0, cached]
    check_tokens(world)


@pytest.mark.parametrize("policy", ["tova", "snapkv"])
def test_output_after_a_compaction_is_not_found(policy):
    world = sparse(policy, caching=True)
    world.add("a", prompt=prompt_of(24, 3), max_tokens=20)
    world.finish()
    world.add("b", prompt=prompt_of(24, 3) + world.tokens("a") + prompt_of(9), max_tokens=2)
    world.finish()
    assert world.cached("b")[0] == 24
    check_tokens(world)


@POLICIES
@DEPTHS
def test_samples_share_what_was_kept_of_their_prompt(policy, depth):
    world = sparse(policy, budget=12)
    world.add("a", length=30, max_tokens=2, n=3)
    world.schedule()
    assert world.counts()["used"] == 2
    world.finish(depth)
    check_tokens(world)


@POLICIES
@DEPTHS
def test_beams_drop_rows_and_come_to_their_tokens(policy, depth):
    dense, world = World(), sparse(policy, budget=12)
    for each in (dense, world):
        each.add("a", length=30, max_tokens=20, n=2, beam_width=3)
        each.finish(depth)
    assert [world.tokens("a", index) for index in (0, 1)] == [dense.tokens("a", index) for index in (0, 1)]
    assert len(compactions(world)) >= (1 if policy == "snapkv" else 4)


@POLICIES
def test_prompt_logprobs_are_of_the_whole_prompt(policy):
    world = sparse(policy, caching=True)
    world.add("a", length=30, max_tokens=10, prompt_logprobs=0)
    world.finish()
    assert len(world.deltas[0].prompt_logprobs) == 29


# -- preemption ------------------------------------------------------------------------------------------------------


def crowded(policy="tova", num_host_blocks=10, num_blocks=7, **options):
    """Two requests in blocks for less than both. The second drops rows of its prompt; then the first needs its blocks.
    """
    world = sparse(policy, num_blocks=num_blocks, num_host_blocks=num_host_blocks, **options)
    world.add("a", length=8, max_tokens=30)
    world.add("b", length=20, max_tokens=30)
    return world


@POLICIES
@DEPTHS
@pytest.mark.parametrize("num_host_blocks", [0, 1, 2, 3, 4, 10])
@pytest.mark.parametrize("num_blocks", [5, 6, 7, 8, 9])
def test_whatever_the_room_everybody_comes_to_the_same_tokens(policy, depth, num_host_blocks, num_blocks):
    world = crowded(policy, num_host_blocks, num_blocks + (2 if policy == "snapkv" else 0), caching=True)
    world.finish(depth)
    check_tokens(world)


@POLICIES
def test_a_sequence_that_has_dropped_rows_is_swapped_whatever_is_cheaper(policy):
    world = crowded(policy)
    world.finish()
    assert world.preemptions[0] >= 1 and world.scheduler.preemptor.num_rechosen == 0


def test_one_that_comes_back_says_how_many_rows_its_blocks_hold():
    world = crowded()
    world.finish()
    back = [(start, step) for plan in world.plans for start in plan.starts for step in plan.steps
            if step.seq_id == start.seq_id and start.num_dropped_tokens]
    (start, step), = back
    assert start.num_computed_tokens - start.num_dropped_tokens == 24 - 1 and len(step.new_block_ids[0]) == 3


def test_what_the_ranks_keep_of_a_swapped_sequence_stays_until_it_comes_back():
    world = crowded("h2o")
    world.finish()
    suspends = [seq_id for plan in world.plans for seq_id in plan.suspends]
    assert suspends and not world.rank.held.suspended
    check_tokens(world)


def test_what_the_ranks_keep_of_a_swapped_sequence_goes_when_it_is_cancelled():
    world = crowded("h2o")
    while not world.rank.held.suspended:
        world.step()
    world.cancel("b")
    world.finish()
    assert not world.rank.held.suspended


@pytest.mark.parametrize("steps", [7, 8, 13])
def test_beams_that_fork_while_their_rows_are_swapped_out_come_back_with_their_scores(steps):
    dense, world = World(), sparse("h2o", budget=12, num_blocks=12, num_host_blocks=40)
    for each in (dense, world):
        each.add("a", length=30, max_tokens=20, n=2, beam_width=3)
    dense.finish()
    for _ in range(steps):
        world.step()
    # In flight while the next plan takes the blocks: the beams fork when they are out.
    world.schedule()
    world.add("b", length=40, priority=-1, max_tokens=20)
    world.finish()
    assert world.preemptions[0] > 0
    assert [world.tokens("a", index) for index in (0, 1)] == [dense.tokens("a", index) for index in (0, 1)]


def test_another_victim_is_taken_where_the_host_has_no_room():
    """The last in line has dropped rows and fits the host no more; the one before it has dropped none."""
    world = sparse(num_blocks=10, num_host_blocks=1, interval=24)
    world.add("a", length=17, max_tokens=40)
    world.add("b", length=8, max_tokens=40)
    world.add("c", length=17, max_tokens=40)
    while not sum(world.preemptions):
        world.step()
    assert (world.running, world.scheduler.preemptor.num_rechosen) == (["a", "c"], 0)
    world.finish()
    check_tokens(world)


def test_as_a_last_resort_rows_are_chosen_again_and_that_is_counted():
    world = crowded(num_host_blocks=0)
    world.finish()
    status = Accounting(world.scheduler, [1000]).status()
    assert status["num_rechosen"] == status["num_preemptions_by_recompute"] > 0
    check_tokens(world)


def test_while_one_waits_for_the_blocks_of_its_compaction_nobody_behind_it_takes_them():
    """One block is free, the last in line needs two, and its rows fit the host no more."""
    world = sparse(num_blocks=7)
    world.add("a", length=12, max_tokens=30)
    world.add("b", length=20, max_tokens=30)
    while len(world.step()) > 1:
        pass
    world.add("c", length=4, max_tokens=3)
    assert world.counts()["free"] == 1
    assert [name for name, _ in world.step()] == ["a"]
    assert world.running == ["a", "b"]
    world.finish()
    check_tokens(world)


@POLICIES
def test_what_is_computed_again_drops_rows_at_the_same_lengths(policy):
    world = crowded(policy, num_host_blocks=0)
    world.finish()
    alone = sparse(policy)
    alone.add("b", length=20, max_tokens=30)
    alone.finish()
    at, begun = [], 0
    for plan in world.plans:
        begun = 0 if any(world.names[start.seq_id] == "b" for start in plan.starts) else begun
        for step in plan.steps:
            if world.names[step.seq_id] == "b":
                begun += step.num_tokens
                at += [begun] if step.compaction else []
    assert set(at) == set(compacted_at(alone, "b"))


@POLICIES
@DEPTHS
@pytest.mark.parametrize("n", [1, 2])
def test_a_request_goes_on_after_a_recovery(policy, depth, n):
    """In a pool that never held all of its tokens at once."""
    before = sparse(policy)
    before.add("a", length=20, max_tokens=60, n=n)
    before.finish()
    outputs = [before.tokens("a", index) for index in range(n)]
    world = sparse(policy, num_blocks=5 * n + (8 * n if policy == "snapkv" else 0))
    world.add("a", length=20, max_tokens=60, n=n, produced=[output[:41] for output in outputs])
    world.finish(depth)
    assert [world.tokens("a", index) for index in range(n)] == [output[41:] for output in outputs]


def test_compactions_and_dropped_rows_are_counted():
    world = sparse()
    world.add("a", length=30, max_tokens=10)
    world.finish()
    status = Accounting(world.scheduler, [1000]).status()
    assert (status["num_compactions"], status["num_dropped_rows"], status["num_rechosen"]) == (2, 14 + 8, 0)
