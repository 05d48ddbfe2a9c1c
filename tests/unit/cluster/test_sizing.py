"""How many blocks the pools get from what their ranks say."""

from __future__ import annotations

import pytest

from kvarto.cluster.block_space.sizing import (
    CPU_POOL_CAP_BYTES,
    CPU_SWAP_CAP_BYTES,
    num_blocks,
    num_disk_blocks,
    num_host_blocks,
)
from kvarto.protos.config import EngineConfig
from kvarto.protos.errors import ResourcesError
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.step import RankCosts, RankReady

BLOCK = 1000


def rank(number=0, *, available=100 * BLOCK, host=100 * BLOCK, node="a", block=(BLOCK,), groups=None):
    return RankReady(
        rank=number, kv_groups=groups or [KVGroupSpec(layer_ids=(0,))] * len(block), block_bytes=list(block),
        available_bytes=available, available_host_bytes=host, kernels="", node=node, pid=1,
        costs=RankCosts(copy_bytes_per_s=1e9, prefill_tokens_per_s=1e3))


def size(ranks, *, device="cpu", max_model_len=100_000, **config):
    return num_blocks(EngineConfig(model="m", **config), ranks, max_model_len, device)


def test_the_pool_takes_half_of_what_is_left_less_the_null_block():
    assert size([rank()]) == [49]


def test_a_number_that_was_given_is_taken():
    assert size([rank()], num_blocks=99) == [99]


def test_a_number_that_does_not_fit_is_an_error_that_says_what_does():
    with pytest.raises(ResourcesError, match="at most 99 blocks fit"):
        size([rank()], num_blocks=100)


def test_a_memory_size_that_was_given_is_kept_to():
    assert size([rank()], kv_cache_memory_bytes=80 * BLOCK) == [79]


def test_a_memory_size_beyond_what_there_is_is_cut():
    assert size([rank()], kv_cache_memory_bytes=800 * BLOCK) == [99]


def test_no_block_at_all_is_an_error_that_says_what_to_do():
    with pytest.raises(ResourcesError, match="kv_cache_memory_bytes"):
        size([rank(available=BLOCK)])


def test_the_tightest_rank_decides():
    assert size([rank(0), rank(1, available=40 * BLOCK, node="b")]) == [19]


def test_ranks_of_one_host_share_its_memory():
    assert size([rank(0), rank(1)]) == [24]


def test_every_gpu_of_a_host_has_memory_of_its_own():
    assert size([rank(0), rank(1)], device="cuda") == [49]


def test_every_kv_group_gets_as_many_blocks():
    assert size([rank(block=(BLOCK, BLOCK))]) == [24, 24]


def test_more_than_every_sequence_at_its_longest_is_not_taken():
    assert size([rank()], max_num_seqs=2, max_model_len=33) == [6]


def test_a_pool_on_a_cpu_that_was_given_no_size_is_capped():
    assert size([rank(available=2**40)], max_num_seqs=10**6) == [CPU_POOL_CAP_BYTES // BLOCK - 1]


def test_a_pool_on_a_gpu_is_not_capped():
    assert size([rank(available=2**40)], max_num_seqs=10**6, device="cuda")[0] > CPU_POOL_CAP_BYTES // BLOCK


# -- windows ---------------------------------------------------------------------------------------------------------


SLIDING = KVGroupSpec(layer_ids=(1,), window=40, num_sinks=1)
"""With blocks of 16 tokens and 4 sequences that compute 64 tokens in a step, no more than 4 (3 + 1 + 2) + 4 blocks."""
FEW = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "enable_prefix_caching": False}


def both(**fields):
    return rank(block=(BLOCK, BLOCK), groups=[KVGroupSpec(layer_ids=(0,)), SLIDING], **fields)


def test_a_kv_group_with_a_window_leaves_the_others_what_it_cannot_use():
    """28 blocks and a null block of 100, and the rest is the other group's, with its own."""
    assert size([both(available=200 * BLOCK)], **FEW) == [70, 28]


def test_the_prefix_cache_keeps_the_windows_of_as_many_ended_sequences():
    """8 (3 + 1 + 2) + 4 blocks."""
    assert size([both(available=300 * BLOCK)], **FEW | {"enable_prefix_caching": True}) == [150 - 52 - 2, 52]


def test_a_kv_group_with_a_window_has_no_more_blocks_than_the_others():
    assert size([both()], **FEW) == [24, 24]


@pytest.mark.parametrize(("num_blocks", "counts"), [(20, [20, 20]), (28, [28, 28]), (60, [60, 28])])
def test_a_number_that_was_given_is_that_of_the_groups_without_a_window(num_blocks, counts):
    assert size([both()], num_blocks=num_blocks, **FEW) == counts


def test_a_number_that_does_not_fit_beside_the_pool_of_a_window_is_an_error_that_says_what_does():
    with pytest.raises(ResourcesError, match="at most 70 blocks fit"):
        size([both()], num_blocks=71, **FEW)


def test_where_every_group_has_a_window_none_takes_more_than_it_can_use():
    assert size([rank(available=2**40, groups=[SLIDING])], **FEW) == [28]


@pytest.mark.parametrize("available", [*range(4, 60), 90, 113, 200])
def test_pools_of_blocks_of_different_sizes_fill_the_memory_that_they_may_take(available):
    ready = rank(available=available * BLOCK, block=(3 * BLOCK, BLOCK), groups=[KVGroupSpec(layer_ids=(0,)), SLIDING])
    try:
        full, sliding = size([ready], kv_cache_memory_bytes=available * BLOCK, **FEW)
    except ResourcesError:
        assert available < 8
        return

    def taken(count):
        return 3 * (count + 1) + min(count, 28) + 1

    assert sliding == min(full, 28)
    assert taken(full) <= available < taken(full + 1)


def test_the_host_pool_of_a_kv_group_with_a_window_is_as_small():
    config = EngineConfig(model="m", swap_space_bytes=90 * BLOCK, **FEW)
    assert num_host_blocks(config, [both()], [70, 28], "cuda") == [62, 28]
    config = EngineConfig(model="m", **FEW)
    assert num_host_blocks(config, [both(host=2**40)], [70, 28], "cuda") == [70, 28]


# -- host ------------------------------------------------------------------------------------------------------------


def host_size(*ranks, blocks=1000, device="cuda", **config):
    return num_host_blocks(
        EngineConfig(model="m", **config), list(ranks), [blocks] * len(ranks[0].block_bytes), device)


def test_the_host_pool_takes_a_tenth_of_what_is_left():
    assert host_size(rank()) == [10]


def test_the_host_pool_is_by_default_no_larger_than_the_device_pool():
    assert host_size(rank(), blocks=7) == [7]


def test_a_host_pool_that_was_given_no_size_is_capped():
    assert host_size(rank(host=2**40), blocks=10**9) == [CPU_SWAP_CAP_BYTES // BLOCK]


def test_swap_space_that_was_given_is_taken():
    assert host_size(rank(), blocks=7, swap_space_bytes=20 * BLOCK + 999) == [20]


def test_swap_space_of_nothing_is_no_host_pool():
    assert host_size(rank(), swap_space_bytes=0) == [0]


def test_a_host_without_memory_is_no_host_pool_unless_one_was_asked_for():
    assert host_size(rank(host=0)) == [0]


def test_ranks_of_one_host_share_its_swap_space():
    assert host_size(rank(0), rank(1)) == [5]


def test_every_kv_group_gets_as_many_host_blocks():
    assert host_size(rank(block=(BLOCK, BLOCK))) == [5, 5]


def test_the_tightest_host_decides():
    assert host_size(rank(0), rank(1, host=40 * BLOCK, node="b")) == [4]


def test_more_swap_space_than_there_is_is_refused_with_what_there_is():
    with pytest.raises(ResourcesError, match=r"swap_space_bytes=100001 is more than the 100000 bytes .*lower it"):
        host_size(rank(), swap_space_bytes=100 * BLOCK + 1)


def test_swap_space_of_less_than_a_block_is_refused_with_the_size_of_one():
    with pytest.raises(ResourcesError, match=r"swap_space_bytes=999 holds no block: one takes 1000 bytes"):
        host_size(rank(), swap_space_bytes=BLOCK - 1)


@pytest.mark.parametrize("config", [{"num_blocks": 99}, {"swap_space_bytes": 90 * BLOCK}])
def test_device_and_host_pool_of_a_cpu_fit_its_memory_together(config):
    ready = rank()
    try:
        blocks = size([ready], **config)
        host_blocks = num_host_blocks(EngineConfig(model="m", **config), [ready], blocks, "cpu")
    except ResourcesError:
        return
    assert (blocks[0] + 1 + host_blocks[0]) * BLOCK <= ready.available_bytes


def test_the_pool_of_a_cpu_leaves_the_host_pool_the_rest_of_its_memory():
    assert host_size(rank(), blocks=49, device="cpu") == [5]
    assert host_size(rank(), blocks=49, device="cpu", swap_space_bytes=50 * BLOCK) == [50]


def test_the_pool_of_a_cpu_counts_with_every_kv_group_and_its_null_block():
    """Two pools of 19 blocks and a null block take 40 of 100."""
    config = {"blocks": 19, "device": "cpu"}
    assert host_size(rank(block=(BLOCK, BLOCK)), swap_space_bytes=60 * BLOCK, **config) == [30, 30]
    with pytest.raises(ResourcesError, match="more than the 60000 bytes"):
        host_size(rank(block=(BLOCK, BLOCK)), swap_space_bytes=60 * BLOCK + 1, **config)


def test_every_rank_of_a_cpu_has_a_pool_of_its_own_in_its_share_of_the_memory():
    assert host_size(rank(0), rank(1), blocks=19, device="cpu", swap_space_bytes=30 * BLOCK) == [30]
    with pytest.raises(ResourcesError, match="more than the 30000 bytes"):
        host_size(rank(0), rank(1), blocks=19, device="cpu", swap_space_bytes=30 * BLOCK + 1)


def test_a_pool_of_a_cpu_that_leaves_nothing_leaves_no_host_pool():
    assert host_size(rank(), blocks=99, device="cpu") == [0]
    assert host_size(rank(), blocks=500, device="cpu") == [0]


def test_swap_space_beside_a_pool_of_a_cpu_that_leaves_nothing_is_refused():
    with pytest.raises(ResourcesError, match="more than the 0 bytes"):
        host_size(rank(), blocks=500, device="cpu", swap_space_bytes=BLOCK)


def test_the_pool_of_a_gpu_takes_nothing_from_its_host():
    assert host_size(rank(), blocks=99, swap_space_bytes=100 * BLOCK) == [100]


# -- disk ------------------------------------------------------------------------------------------------------------


def test_without_a_directory_there_is_no_disk_tier():
    assert num_disk_blocks(EngineConfig(model="m"), [rank()]) == 0


def test_the_disk_tier_holds_so_many_bytes_of_the_largest_rank(tmp_path):
    config = EngineConfig(model="m", kv_disk_path=str(tmp_path), kv_disk_bytes=10 * BLOCK)
    assert num_disk_blocks(config, [rank(0), rank(1, block=(BLOCK, BLOCK))]) == 5


def test_a_disk_tier_of_less_than_a_block_is_refused(tmp_path):
    config = EngineConfig(model="m", kv_disk_path=str(tmp_path), kv_disk_bytes=BLOCK - 1)
    with pytest.raises(ResourcesError, match="kv_disk_bytes"):
        num_disk_blocks(config, [rank()])
