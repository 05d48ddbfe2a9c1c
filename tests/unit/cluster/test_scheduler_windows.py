"""Models with sliding windows in the scheduler: long sequences in small pools, whoever else is there.

Blocks hold 8 tokens; the window is 20 tokens and there are 3 sinks unless a test says otherwise.
"""

from __future__ import annotations

import importlib.util
from collections import deque
from pathlib import Path

import pytest

from kvarto.cluster.block_space import BlockSpace, State
from kvarto.cluster.scheduler import Scheduler, SchedulerLimits
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.request import AddRequest
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.step import SampledToken, StepResult

_spec = importlib.util.spec_from_file_location("scheduler_world", Path(__file__).with_name("scheduler_world.py"))
assert _spec and _spec.loader
world_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world_module)
World, prompt_of, check_tokens = world_module.World, world_module.prompt_of, world_module.check_tokens
memory_model = world_module.memory_model

FULL = KVGroupSpec(layer_ids=(0,))
WINDOW = KVGroupSpec(layer_ids=(1,), window=20, num_sinks=3)
MOST_HELD = 3 + 1 + 2
"""Blocks of a decoding sequence in the pool of a window."""


def enough(num_seqs, budget=64):
    return num_seqs * MOST_HELD + budget // 8


def windowed(num_full=100, num_seqs=1, **options):
    """A group without a window, and one whose pool is just large enough for `num_seqs` sequences."""
    return World([num_full, enough(num_seqs, options.get("budget", 64))], kv_groups=[FULL, WINDOW], **options)


class CountingTable(list):
    """Counts the entries that are looked at."""

    num_looks = 0

    def __getitem__(self, index):
        found = super().__getitem__(index)
        CountingTable.num_looks += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self):
        CountingTable.num_looks += len(self)
        return super().__iter__()


def endless(num_tokens, groups, num_blocks, depth=2, look=lambda space: None, tables=list):
    """One sequence that decodes `num_tokens`, with plans in flight; `look` is called after every plan."""
    space = BlockSpace(groups, num_blocks, 8, enable_prefix_caching=True)
    scheduler = Scheduler(space, SchedulerLimits(8, 64), epoch=1)
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    group = scheduler.add(AddRequest(request_id="a", prompt_token_ids=[1, 2, 3], params=params), b"o", num_tokens)
    blocks = group.live[0].blocks
    blocks.tables = [tables(table) for table in blocks.tables]
    in_flight, num_steps = deque(), 0
    while scheduler.num_unfinished:
        while len(in_flight) < depth and (plan := scheduler.schedule()) is not None:
            in_flight.append(plan)
            look(space)
        plan = in_flight.popleft()
        scheduler.update(StepResult(epoch=1, step_id=plan.step_id, tokens=[
            SampledToken(seq_id=step.seq_id, token_id=5) for step in plan.steps]))
        num_steps += 1
        if tables is list and num_steps % 2000 == 0:
            space.check_integrity()
    assert num_steps == num_tokens


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("window", "num_sinks"), [(20, 3), (8, 0), (1, 0), (5, 9)])
def test_a_sequence_without_end_holds_its_window_and_its_sinks(window, num_sinks, depth):
    """Blocks that wait for a result included."""
    held = set()

    def look(space):
        held.add(space.devices[0].counts[State.USED] + space.devices[0].counts[State.RELEASING])

    endless(20_000, [KVGroupSpec(layer_ids=(0,), window=window, num_sinks=num_sinks)], [100], depth, look)
    assert max(held) <= -(-window // 8) + -(-num_sinks // 8) + 2


def test_a_pool_of_that_size_is_enough():
    endless(20_000, [WINDOW], [enough(1)])


def test_every_entry_of_a_table_is_looked_at_once():
    CountingTable.num_looks = 0
    endless(8_000, [WINDOW], [100], tables=CountingTable)
    # When it is offered, and when it falls behind.
    assert 0 < CountingTable.num_looks < 2 * 1_001 + 20


def test_a_long_prompt_in_chunks_goes_through_a_small_pool():
    world = windowed()
    world.add("long", length=500, max_tokens=40)
    world.finish()
    check_tokens(world)
    assert world.preemptions == (0, 0)


def test_a_chunk_holds_no_more_than_its_window_once_it_is_computed():
    world = World([100, 100], kv_groups=[FULL, WINDOW], budget=64)
    world.add("long", length=64, max_tokens=9)
    world.step()
    assert world.counts(world.space.devices[1]) == {"free": 96, "used": 4}


def test_a_chunk_of_single_tokens_leaves_its_blocks_to_be_found():
    """What is computed token by token is offered before it falls behind."""
    world = World([100, 100], kv_groups=[FULL, WINDOW], caching=True, max_num_seqs=2, budget=2)
    world.add("first", length=3, max_tokens=60)
    world.step()
    world.add("second", prompt=prompt_of(50, start=5), max_tokens=3)
    world.finish(depth=1)
    device = world.space.devices[1]
    keys = []
    world.space.prefix_keys.extend(keys, world.space.prefix_keys.root("shared/"), prompt_of(50, start=5), 48)
    assert all(device.find(key) for key in keys)


@pytest.mark.parametrize("mode", ["swap", "recompute"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("caching", [True, False])
def test_preempted_sequences_with_windows_continue_with_the_same_tokens(mode, depth, caching):
    world = windowed(num_full=16, num_seqs=4, num_host_blocks=20, preemption_mode=mode, caching=caching)
    for name in "abcd":
        world.add(name, length=21, max_tokens=50)
    world.finish(depth)
    assert world.preemptions[mode != "swap"] > 0
    check_tokens(world)


def test_pressure_in_the_pool_of_the_window_alone_preempts():
    world = windowed(num_full=1000, num_seqs=2, budget=16, num_host_blocks=20, preemption_mode="swap")
    for name in "abcde":
        world.add(name, length=3, max_tokens=60)
    world.finish()
    check_tokens(world)
    assert world.preemptions[0] > 0


@pytest.mark.parametrize("params", [{"n": 4}, {"n": 2, "best_of": 4}])
@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_parallel_samples_share_a_prompt_and_part_behind_the_window(params, mode):
    world = windowed(num_full=42, num_seqs=4, budget=16, num_host_blocks=60, preemption_mode=mode)
    world.add("many", length=45, max_tokens=60, **params)
    for _ in range(50):
        world.step()
    world.add("urgent", length=45, max_tokens=40, priority=-1)
    world.finish()
    assert [world.tokens("many", index) for index in range(4)] == [world.alone("many", index) for index in range(4)]
    assert sum(world.preemptions) > 0


def test_beams_go_through_a_small_pool():
    world = windowed(num_seqs=4, budget=16)
    prompt = prompt_of(45)
    world.add("beams", prompt=prompt, beam_width=4, n=4, max_tokens=60)
    world.finish()
    wanted = memory_model.search(prompt, world.groups["beams"].request.params, 60, -1)
    assert [world.tokens("beams", index) for index in range(4)] == [beam.token_ids for beam in wanted]
    assert world.preemptions == (0, 0)


def test_a_prompt_that_comes_again_begins_behind_its_window():
    world = World([100, 100], kv_groups=[FULL, WINDOW], caching=True)
    prompt = prompt_of(60)
    for name in ("first", "second"):
        world.add(name, prompt=prompt, max_tokens=30)
        world.finish()
    check_tokens(world)
    assert (world.cached("first")[0], world.cached("second")[0]) == (0, 56)


def test_a_prompt_whose_window_was_evicted_is_computed_up_to_there():
    world = World([100, 100], kv_groups=[FULL, WINDOW], caching=True)
    prompt = prompt_of(60)
    world.add("first", prompt=prompt, max_tokens=3)
    world.finish()
    device = world.space.devices[1]
    keys = []
    world.space.prefix_keys.extend(keys, world.space.prefix_keys.root("shared/"), prompt, 56)
    device.forget(device.find(keys[5]))
    world.add("second", prompt=prompt, max_tokens=3)
    world.finish()
    assert world.cached("second")[0] == 40
    check_tokens(world)


def test_a_prompt_longer_than_the_pool_of_the_window_is_swapped_and_comes_back():
    world = windowed(num_seqs=1, budget=16, num_host_blocks=100, preemption_mode="swap")
    world.add("long", length=300, max_tokens=5, priority=1)
    for _ in range(5):
        world.step()
    world.add("urgent", length=50, max_tokens=5)
    world.finish()
    assert world.preemptions == (1, 0)
    check_tokens(world)
