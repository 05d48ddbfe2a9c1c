"""The residual of an int4 cache: a sequence holds the block that it fills there, and nothing of it is cached.

Blocks hold 8 tokens; KV group 0 has no window, the last one is the residual.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from kvarto.cluster.admission import check
from kvarto.cluster.block_space import BlockSpace, State
from kvarto.cluster.block_space.accounting import space_map
from kvarto.cluster.block_space.sizing import num_blocks, num_disk_blocks, num_host_blocks
from kvarto.cluster.block_space.windows import enough_blocks
from kvarto.protos.config import EngineConfig
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.request import EngineInfo, KVPool
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.step import RankCosts, RankReady

_spec = importlib.util.spec_from_file_location("scheduler_world", Path(__file__).with_name("scheduler_world.py"))
assert _spec and _spec.loader
world_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world_module)
World, check_tokens = world_module.World, world_module.check_tokens

FULL = KVGroupSpec(layer_ids=(0,))
WINDOW = KVGroupSpec(layer_ids=(1,), window=20, num_sinks=3)
RESIDUAL = KVGroupSpec(layer_ids=(0, 1), residual=True)
ROOT = b"r" * 16
TOKENS = list(range(100))


class Space(BlockSpace):
    def __init__(self, *groups, num_blocks=20, num_host_blocks=0, **options):
        groups = list(groups or (FULL, RESIDUAL))
        super().__init__(groups, [num_blocks] * len(groups), 8, num_host_blocks=[num_host_blocks] * len(groups),
                         enable_prefix_caching=True, **options)

    def hold(self, seq_id, num_tokens, root=ROOT):
        """A sequence that has computed the first of `TOKENS`."""
        blocks = self.open(seq_id, root=root)
        self.grow(blocks, num_tokens)
        self.offer(blocks, TOKENS[:num_tokens])
        self.release_behind_windows(blocks, busy_until=-1)
        self.check_integrity()
        return blocks


def held(blocks, group=-1):
    """Indices of the blocks in a table."""
    return [index for index, entry in enumerate(blocks.tables[group]) if entry]


@pytest.mark.parametrize(("num_tokens", "expected"), [
    (1, [0]), (7, [0]), (8, []), (9, [1]), (16, []), (17, [2]), (60, [7]), (64, [])])
def test_a_sequence_holds_the_block_that_its_next_token_goes_to(num_tokens, expected):
    blocks = Space().hold(1, num_tokens)
    assert held(blocks) == expected
    assert held(blocks, 0) == list(range(-(-num_tokens // 8)))


def test_a_block_that_a_plan_fills_waits_for_its_result():
    space = Space()
    blocks = space.hold(1, 7)
    space.grow(blocks, 8)
    space.release_behind_windows(blocks, busy_until=0)
    assert space.devices[-1].counts[State.RELEASING] == 1
    space.end_plan()
    space.step_done(0)
    assert space.devices[-1].counts[State.FREE] == 20


def test_a_hit_needs_nothing_of_the_residual_and_full_blocks_are_not_found_there():
    space = Space()
    space.free(space.hold(1, 30), busy_until=-1)
    assert not any(space.devices[-1].keys)
    blocks = space.open(2, root=ROOT)
    match = space.match(blocks, TOKENS)
    assert (len(match), space.num_to_take(match)) == (3, [3, 0])
    space.attach(blocks, match)
    assert (blocks.tables[-1], blocks.num_behind[-1]) == ([0, 0, 0], 3)
    space.grow(blocks, 28)
    assert held(blocks) == [3]
    space.check_integrity()


def test_a_fork_that_writes_gets_the_block_that_is_being_filled_in_both_groups():
    space = Space()
    parent, child = space.hold(1, 12), space.open(2)
    space.fork(parent, child)
    assert space.num_missing([(parent, 13), (child, 13)]) == [1, 1]
    _, copied = space.grow(child, 13)
    assert copied == [table[-1] for table in child.tables]
    assert [len(moves.copies) for moves in space.end_plan()] == [1, 1]
    space.check_integrity()


def test_a_swap_moves_the_block_that_is_being_filled_and_no_other_of_the_residual():
    space = Space(num_host_blocks=8)
    blocks = space.hold(1, 60, root=None)
    space.swap_out([blocks], busy_until=-1)
    assert [len(moves.swap_outs) for moves in space.end_plan()] == [8, 1]
    space.step_done(0)
    assert space.num_to_swap_in([blocks]) == [8, 1]
    space.swap_in([blocks])
    assert [len(moves.swap_ins) for moves in space.end_plan()] == [8, 1]
    space.step_done(1)
    space.check_integrity()


def test_nothing_of_the_residual_falls_to_the_disk_or_is_read_from_there():
    keys = [bytes([number]) * 16 for number in range(2)]
    space = Space(num_host_blocks=4, disk_capacity=8, stored_keys=keys)
    assert (space.tiers.num_on_disk, space.tiers.num_loadable(keys), space.tiers.num_host_blocks) == (2, 2, 4)
    space.tiers.load(keys)
    moves = space.end_plan()
    assert [len(each.disk_loads) for each in moves] == [2, 0]
    assert space.tiers.num_loading == 2
    space.tiers.loaded(keys, {keys[1]})
    assert [len(each.disk_drops) for each in space.end_plan()] == [1, 0]
    assert [group["disk"]["capacity"] for group in space_map(space)] == [8, 0]
    space.check_integrity()


@pytest.mark.parametrize(("groups", "tokens"), [
    ((FULL, RESIDUAL), 80), ((FULL, WINDOW, RESIDUAL), 80), ((WINDOW, RESIDUAL), 80)])
def test_the_residual_bounds_no_capacity(groups, tokens):
    assert BlockSpace(list(groups), [10, *[20] * (len(groups) - 2), 5], 8).capacity_tokens == tokens


# -- the size of its pool --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [KVPool, KVGroupSpec])
def test_it_needs_a_block_for_every_sequence_and_those_of_a_chunk(kind):
    group = kind(residual=True, **({"num_blocks": 1} if kind is KVPool else {"layer_ids": (0,)}))
    # Of one that goes on at the last slot of a block, 64 tokens take that block and 8 more.
    assert [enough_blocks(group, 8, 3, budget) for budget in (1, 2, 9, 10, 64, 65)] == [3, 4, 4, 5, 11, 11]


@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize("budget", range(1, 40))
def test_no_step_of_one_sequence_holds_more(block_size, budget):
    """Counted token by token: whatever chunks a prompt is cut into."""
    most = max(len({place // block_size for place in range(begin, begin + count)})
               for begin in range(2 * block_size) for count in range(1, budget + 1))
    assert most == enough_blocks(RESIDUAL, block_size, 1, budget)


def rank(*block_bytes, groups=(FULL, RESIDUAL), memory=10**6):
    return RankReady(
        rank=0, kv_groups=list(groups), block_bytes=list(block_bytes), available_bytes=memory,
        available_host_bytes=memory, kernels="", node="a", pid=1,
        costs=RankCosts(copy_bytes_per_s=1e9, prefill_tokens_per_s=1e3))


@pytest.mark.parametrize("caching", [False, True])
def test_the_rest_of_the_memory_is_the_other_groups(caching):
    """4 + 4 blocks and a null block of 3,000 bytes; of the rest blocks of 1,000 bytes, the null block one of them."""
    config = EngineConfig(model="m", max_num_seqs=4, max_num_batched_tokens=64, kv_cache_memory_bytes=100_000,
                          enable_prefix_caching=caching, swap_space_bytes=100_000)
    ready = [rank(1000, 3000)]
    blocks = num_blocks(config, ready, 100_000, "cuda")
    assert blocks == [72, 8]
    assert num_host_blocks(config, ready, blocks, "cuda") == [76, 8]


def test_in_a_small_pool_it_has_as_many_blocks_as_the_others():
    config = EngineConfig(model="m", num_blocks=5)
    assert num_blocks(config, [rank(1000, 3000)], 100_000, "cuda") == [5, 5]


def test_the_disk_keeps_blocks_of_the_other_groups_alone(tmp_path):
    config = EngineConfig(model="m", kv_disk_path=str(tmp_path), kv_disk_bytes=10_000)
    assert num_disk_blocks(config, [rank(1000, 1000, 3000, groups=(FULL, WINDOW, RESIDUAL))]) == 5


def test_it_bounds_no_request_that_it_has_a_block_and_a_chunk_for():
    def longest(num_residual, **params):
        pool = KVPool(num_blocks=num_residual, residual=True)
        info = EngineInfo(
            epoch=1, max_model_len=1000, vocab_size=200, max_num_seqs=4, kv_capacity_tokens=0, block_size=8,
            max_num_batched_tokens=40, kv_pools=[KVPool(num_blocks=500), pool],
            num_host_blocks=0, kernels="", dtype="", kv_cache_dtype="int4", tp_size=1, num_groups=1)
        return check([1] * 4, SamplingParams(max_tokens=None, **params), info)

    assert [longest(6), longest(5)] == [996, 5 * 8 - 4]
    assert [longest(8, n=3), longest(7, n=3)] == [996, 2 * 8 - 4]


# -- in the scheduler ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2])
def test_as_many_sequences_as_there_may_be_run_without_preemption(depth):
    world = World([200, enough_blocks(RESIDUAL, 8, 4, 40)], budget=40, max_num_seqs=4, kv_groups=[FULL, RESIDUAL],
                  caching=True)
    for number, length in enumerate((3, 70, 8, 100, 16, 41)):
        world.add(str(number), length=length, max_tokens=40)
    world.finish(depth)
    check_tokens(world)
    assert world.preemptions == (0, 0)
    assert world.rank.seen["quantized"] > 40


@pytest.mark.parametrize("mode", ["swap", "recompute"])
def test_a_small_residual_makes_sequences_wait_and_changes_nothing(mode):
    world = World([60, 6], budget=40, kv_groups=[FULL, RESIDUAL], num_host_blocks=40, preemption_mode=mode)
    for number, length in enumerate((3, 30, 8, 33)):
        world.add(str(number), length=length, max_tokens=20, n=1 + number % 3)
    world.finish()
    check_tokens(world)


def test_beams_share_and_copy_the_block_that_is_being_filled():
    world = World([60, 60], kv_groups=[FULL, RESIDUAL])
    world.add("beams", length=12, max_tokens=20, beam_width=3, n=3)
    world.finish()
    assert {delta.seq_index for delta in world.deltas} == {0, 1, 2}
    assert world.rank.seen["copies"] > 0
