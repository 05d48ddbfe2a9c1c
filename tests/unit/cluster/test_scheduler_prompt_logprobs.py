"""Log probabilities of a prompt come once and whole, whatever happens to its sequence meanwhile."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_spec = importlib.util.spec_from_file_location("scheduler_world", Path(__file__).with_name("scheduler_world.py"))
assert _spec and _spec.loader
world_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world_module)
World = world_module.World


def prompt_is_whole(world, group):
    """Whether every prompt position has had its log probabilities once, in order."""
    name, prompt = group.request.request_id, group.request.prompt_token_ids
    positions = [item for delta in world.deltas if delta.request_id == name for item in delta.prompt_logprobs]
    return [item.token_id for item in positions] == prompt[1:]


def test_prompt_logprobs_come_once_and_whole():
    world = World(budget=8)
    group = world.add("a", length=20, prompt_logprobs=1)
    world.finish()
    assert prompt_is_whole(world, group)


def test_prompt_logprobs_are_not_repeated_after_a_preemption_in_the_prompt():
    world = World(budget=8)
    group = world.add("a", length=20, prompt_logprobs=1)
    world.step()
    world.preempt("a")
    world.finish()
    assert prompt_is_whole(world, group)


def test_prompt_logprobs_are_not_repeated_after_a_preemption_in_the_output():
    world = World()
    group = world.add("a", length=20, prompt_logprobs=1)
    world.step()
    world.step()
    world.preempt("a")
    world.finish()
    assert prompt_is_whole(world, group)


def test_prompt_logprobs_are_whole_when_the_sequence_is_preempted_with_its_first_token_on_its_way():
    world = World(budget=16)
    group = world.add("a", length=20, prompt_logprobs=1)
    world.step()
    world.schedule()
    world.preempt("a")
    world.finish()
    assert prompt_is_whole(world, group)


def test_prompt_logprobs_are_whole_when_the_chunks_after_a_preemption_are_others():
    world = World(budget=8)
    world.add("other", max_tokens=2)
    group = world.add("a", length=20, prompt_logprobs=1)
    world.schedule()
    world.preempt("a")
    world.finish()
    assert prompt_is_whole(world, group)


def test_prompt_logprobs_are_whole_when_the_first_sequence_is_cancelled_with_the_end_of_its_prompt_in_two_plans():
    world = World(budget=8)
    group = world.add("a", length=20, prompt_logprobs=1, n=2)
    world.step()
    world.schedule()
    world.schedule()
    world.cancel("a", 0)
    world.result()
    world.result()
    world.finish()
    assert prompt_is_whole(world, group)
