"""How much prefill joins a step in which sequences decode. Blocks hold 8 tokens, a step at most 64."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kvarto.protos.sparsity import KVSparsity

_spec = importlib.util.spec_from_file_location("scheduler_world", Path(__file__).with_name("scheduler_world.py"))
assert _spec and _spec.loader
world_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world_module)
World, check_tokens = world_module.World, world_module.check_tokens

DEPTHS = pytest.mark.parametrize("depth", [1, 2])


def decoding(num_sequences=1, *, mixed=16, max_tokens=30, priority=0, **options):
    """Sequences of "old" decode."""
    world = World(mixed=mixed, **options)
    world.add("old", n=num_sequences, max_tokens=max_tokens, priority=priority)
    world.step()
    return world


def test_prompts_that_arrive_together_have_the_whole_step():
    world = World(mixed=16)
    world.add("a", length=40)
    world.add("b", length=40)
    assert world.step() == [("a", 40), ("b", 24)]


def test_beside_a_sequence_that_decodes_prompts_share_what_is_theirs():
    world = decoding()
    world.add("a", length=20)
    world.add("b", length=100)
    assert [world.step() for _ in range(3)] == [
        [("old", 1), ("a", 16)], [("old", 1), ("a", 4), ("b", 12)], [("old", 1), ("a", 1), ("b", 16)]]


def test_without_a_limit_a_prompt_has_the_whole_step_beside_sequences_that_decode():
    world = decoding(mixed=None)
    world.add("new", length=100)
    assert world.step() == [("old", 1), ("new", 63)]


def test_a_prompt_has_the_whole_step_again_when_nobody_decodes_any_more():
    world = decoding(max_tokens=3)
    world.add("new", length=100)
    assert [world.step()[-1] for _ in range(3)] == [("new", 16), ("new", 16), ("new", 64)]


def test_a_sequence_whose_last_token_is_on_its_way_holds_nobody_up():
    world = World(mixed=16)
    world.add("old", max_tokens=1)
    world.schedule()
    world.add("new", length=100)
    assert world.schedule() == [("new", 64)]


def test_a_sequence_whose_first_token_is_on_its_way_decodes():
    world = World(mixed=16)
    world.add("old")
    world.schedule()
    world.add("new", length=100)
    assert world.schedule() == [("old", 1), ("new", 16)]


def test_a_sequence_that_is_computed_again_is_a_prompt():
    world = World(mixed=16)
    world.add("back", length=60, max_tokens=30, produced=[[5] * 20])
    assert [world.step() for _ in range(2)] == [[("back", 64)], [("back", 16)]]


def test_all_samples_decode_beside_a_prompt_that_has_less_than_they():
    world = decoding(4, mixed=2)
    world.add("new", length=20)
    assert world.step() == [("old", 1)] * 4 + [("new", 2)]


def test_no_step_is_larger_than_any_may_be():
    world = decoding(4, mixed=16, budget=6)
    world.add("new", length=20)
    assert world.step() == [("old", 1)] * 4 + [("new", 2)]


def test_who_decoded_before_is_swapped_in_though_prompts_have_all_that_is_theirs():
    world = decoding(mixed=4, num_host_blocks=20, preemption_mode="swap")
    world.add("swapped")
    world.step()
    world.preempt("swapped")
    world.add("long", length=30, priority=-1)
    assert world.step() == [("long", 4), ("old", 1)]
    assert ("swapped", 1) in world.step()


@DEPTHS
@pytest.mark.parametrize("policy", ["h2o", "snapkv", "tova"])
def test_the_tokens_that_score_a_prompt_are_computed_together_beside_sequences_that_decode(policy, depth):
    window = 12 if policy == "snapkv" else 1
    world = decoding(4, mixed=window, space={"sparsity": KVSparsity(policy=policy, budget=16, interval=8,
                                                                    window=window)})
    world.add("new", length=45, max_tokens=9)
    world.add("next", length=33, max_tokens=9)
    world.finish(depth)
    check_tokens(world)


@DEPTHS
def test_beams_and_parallel_samples_go_on_beside_prompts_that_come_in_small_pieces(depth):
    world = World(mixed=2, num_blocks=16, num_host_blocks=8, caching=True)
    world.add("samples", length=20, n=3, max_tokens=12)
    world.add("beams", length=20, beam_width=2, n=2, max_tokens=6)
    world.step()
    world.add("new", length=50, max_tokens=9)
    world.finish(depth)
    for index in range(3):
        assert world.tokens("samples", index) == world.alone("samples", index)
    assert world.tokens("new") == world.alone("new")


@pytest.mark.parametrize("sparsity", [None, KVSparsity(policy="snapkv", budget=8, interval=8, window=12)])
def test_nobody_who_decodes_is_preempted_for_tokens_that_are_withheld_for_its_sake(sparsity):
    """The first prompt leaves too little of what is theirs, or nothing."""
    world = decoding(priority=1, num_host_blocks=20, space={"sparsity": sparsity})
    world.add("urgent", length=14 if sparsity else 100)
    world.add("as urgent", length=12 if sparsity else 100)
    steps = world.step()
    assert ("old", 1) in steps
    assert "as urgent" not in dict(steps)
    assert not world.scheduler.preemptor.records
    world.finish()
    check_tokens(world)
