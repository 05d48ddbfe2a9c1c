"""The scheduler where a request is a beam search: forks and deaths of beams, and preemption of all of them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("scheduler_world", Path(__file__).with_name("scheduler_world.py"))
assert _spec and _spec.loader
world_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world_module)
World, EOS, memory_model = world_module.World, world_module.EOS, world_module.memory_model


def expected(world, name):
    request = world.groups[name].request
    return [beam.token_ids for beam in memory_model.search(
        request.prompt_token_ids, request.params, request.params.max_tokens, EOS)[: request.params.n]]


def beams(world, name):
    return [delta.token_ids for delta in world.deltas if delta.request_id == name]


def begun(world, name="a"):
    return [sequence for sequence in world.groups[name].live if sequence.has_begun]


# -- forks and deaths ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [5, 8, 20])
def test_a_search_comes_to_the_beams_that_it_has_alone(width, length):
    world = World()
    world.add("a", length=length, beam_width=width, n=width, max_tokens=12)
    world.finish()
    assert beams(world, "a") == expected(world, "a")


def test_a_prompt_is_computed_once():
    world = World()
    world.add("a", length=20, beam_width=4)
    world.step()
    assert (world.step(), world.computed["a"]) == ([("a", 1)] * 4, 24)


def test_beams_share_the_blocks_of_their_prompt():
    world = World()
    world.add("a", length=16, beam_width=4)
    world.step()
    assert (world.space.num_used, world.space.devices[0].num_references) == (2, 8)


def test_the_shared_last_block_is_copied_for_all_beams_but_one_in_one_plan():
    world = World()
    world.add("a", length=20, beam_width=4)
    world.step()
    world.schedule()
    assert (len(world.moves.copies), world.space.num_used) == (3, 2 + 4)


def test_there_are_never_more_beams_than_asked_for():
    world = World()
    world.add("a", length=20, beam_width=4, max_tokens=30)
    while world.groups["a"].live:
        world.step()
        assert len(world.groups["a"].live) <= 4
    assert not world.scheduler.num_unfinished


def test_beams_that_die_give_their_blocks_back_in_the_same_step():
    """What the live ones hold is all that is in use, from the result on that killed the others."""
    world, died = World(), 0
    world.add("a", length=8, beam_width=4, max_tokens=30)
    while world.groups["a"].live:
        before = set(world.groups["a"].live)
        world.step()
        live = world.groups["a"].live
        died += len(before - set(live)) if live else 0
        held = {block_id for sequence in live for block_id in sequence.blocks.tables[0]}
        assert world.space.num_used == len(held)
    assert died > 0


def test_no_block_is_left_when_a_search_is_over():
    world = World()
    world.add("a", length=20, beam_width=4, n=2, max_tokens=12)
    world.finish()
    assert world.counts() == {"free": 100}


def test_a_beam_waits_for_its_result():
    world = World()
    world.add("a", beam_width=4)
    world.schedule()
    assert world.schedule() is None


def test_others_run_on_while_a_search_waits_for_its_result():
    world = World()
    world.add("a", beam_width=4)
    world.add("b")
    world.schedule()
    assert world.schedule() == [("b", 1)]


def test_ranks_hear_of_tokens_with_the_step_that_computes_them():
    world = World()
    world.add("a", length=5, beam_width=2)
    world.step()
    world.schedule()
    assert [len(step.token_ids) for step in world.plans[-1].steps] == [1, 1]


def test_a_search_is_answered_once_and_whole():
    world = World()
    world.add("a", beam_width=3, n=2, max_tokens=9)
    world.finish()
    assert [(delta.seq_index, bool(delta.finish_reason)) for delta in world.deltas] == [(0, True), (1, True)]


@pytest.mark.parametrize("when", range(5))
def test_a_search_can_be_cancelled(when):
    world = World()
    world.add("a", length=20, beam_width=4, max_tokens=9)
    for _ in range(when):
        world.step()
    world.schedule()
    world.cancel("a")
    world.finish()
    assert (world.counts(), world.deltas) == ({"free": 100}, [])


def test_a_cancel_of_one_sequence_does_not_break_a_search():
    """No frontend of ours sends one; a message must not cost everybody their worker group all the same."""
    world = World()
    world.add("a", length=20, beam_width=4, max_tokens=9)
    world.step()
    world.cancel("a", 1)
    world.finish()


def test_a_search_is_found_by_a_follow_up():
    world = World(caching=True)
    world.add("a", length=16, beam_width=4, max_tokens=17)
    world.finish()
    world.add("b", prompt=world.groups["a"].request.prompt_token_ids + beams(world, "a")[0])
    assert world.step() == [("b", 1)]


def test_two_searches_share_their_prompt():
    world = World(caching=True)
    prompt = world_module.prompt_of(20)
    for name in "ab":
        world.add(name, prompt=prompt, beam_width=2, n=2, max_tokens=9)
    assert world.step() == [("a", 20), ("b", 4)]
    world.finish()
    assert beams(world, "a") == beams(world, "b") == expected(world, "a")


def test_logits_that_are_not_numbers_end_the_search():
    world = World(caching=True)
    world.add("a", length=20, beam_width=4, max_tokens=9)
    world.step()
    world.schedule()
    world.result(failing=[world.plans[-1].steps[1].seq_id])
    assert [delta.error.message for delta in world.deltas] == ["not a number"]
    world.finish()
    assert world.space.num_used == 0


# -- preemption ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["swap", "recompute"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("when", range(6))
def test_a_preempted_search_comes_to_the_same_beams(mode, depth, caching, when):
    world = World(num_blocks=20, num_host_blocks=20, preemption_mode=mode, caching=caching, max_num_seqs=4)
    world.add("a", length=12, beam_width=4, n=4, max_tokens=14, priority=1)
    for _ in range(when):
        world.step()
    world.schedule()
    world.add("high", length=9, max_tokens=3)
    world.finish(depth)
    assert world.preemptions == ((1, 0) if mode == "swap" else (0, 1))
    assert beams(world, "a") == expected(world, "a")
    assert world.tokens("high") == world.alone("high")


def preempted(mode):
    world = World(num_blocks=20, num_host_blocks=20, preemption_mode=mode, max_num_seqs=4)
    world.add("a", length=12, beam_width=4, n=4, max_tokens=14, priority=1)
    for _ in range(4):
        world.step()
    before = world.computed["a"]
    world.add("high", length=9, max_tokens=1)
    world.step()
    return world, before


def test_all_beams_go_together():
    world, _ = preempted("swap")
    tables = [sequence.blocks.tables[0] for sequence in begun(world)]
    assert len(tables) == 4 and all(entry < 0 for table in tables for entry in table)


def test_what_beams_share_moves_once():
    world, _ = preempted("swap")
    entries = {entry for sequence in begun(world) for entry in sequence.blocks.tables[0]}
    assert len(world.moves.swap_outs) == len(entries) < sum(len(s.blocks.tables[0]) for s in begun(world))


def test_a_swapped_search_computes_nothing_again():
    world, before = preempted("swap")
    assert (world.step(), world.computed["a"]) == ([("a", 1)] * 4, before + 4)


def test_a_search_that_is_computed_again_shares_what_its_beams_have_in_common():
    world, before = preempted("recompute")
    world.step()
    # The first beam whole; of the others the first block is found.
    assert world.computed["a"] - before == 16 + 3 * 8


@pytest.mark.parametrize("mode", ["swap", "recompute", "auto"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("num_host_blocks", [0, 4, 30])
def test_searches_that_crowd_each_other_come_to_their_beams(mode, depth, num_host_blocks):
    world = World(num_blocks=15, num_host_blocks=num_host_blocks, preemption_mode=mode, caching=True, budget=24)
    for name in "abc":
        world.add(name, length=11, beam_width=4, n=4, max_tokens=15)
    world.add("d", length=11, n=3, max_tokens=15)
    world.finish(depth)
    assert [beams(world, name) for name in "abc"] == [expected(world, name) for name in "abc"]
    assert [world.tokens("d", index) for index in range(3)] == [world.alone("d", index) for index in range(3)]
