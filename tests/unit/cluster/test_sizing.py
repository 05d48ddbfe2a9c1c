"""How many blocks a pool gets from what its ranks say."""

from __future__ import annotations

import pytest

from kvarto.cluster.block_space.sizing import CPU_POOL_CAP_BYTES, num_blocks
from kvarto.protos.config import EngineConfig
from kvarto.protos.errors import ResourcesError
from kvarto.protos.model import KVGroupSpec
from kvarto.protos.step import RankReady

BLOCK = 1000


def rank(number=0, *, available=100 * BLOCK, node="a", block=(BLOCK,)):
    return RankReady(
        rank=number, kv_groups=[KVGroupSpec(layer_ids=(0,))] * len(block), block_bytes=list(block),
        available_bytes=available, kernels="", node=node, pid=1)


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
