"""Moves of blocks between small pools, against what a plan says."""

from __future__ import annotations

import pytest
import torch

from kvarto.protos.step import BlockMoves
from kvarto.worker.block_mover import BlockMover
from kvarto.worker.disk_tier import DiskTier

SHAPE = (2, 2, 1, 8, 8)
KEY, OTHER = b"k" * 32, b"o" * 32


def device_pool(num_blocks=8, dtype=torch.bfloat16):
    """Block i is full of i."""
    return torch.arange(num_blocks, dtype=dtype).view(-1, 1, 1, 1, 1, 1).expand(num_blocks, *SHAPE).contiguous()


def values(pool):
    """What each block is full of."""
    firsts = pool[:, 0, 0, 0, 0, 0]
    assert torch.equal(pool, firsts.view(-1, 1, 1, 1, 1, 1).expand_as(pool))
    return firsts.tolist()


@pytest.fixture
def disk(tmp_path):
    return DiskTier(str(tmp_path), "abc", [device_pool()[0].nbytes])


def test_a_block_goes_out_and_comes_back_elsewhere():
    device = device_pool()
    mover = BlockMover([device], [2], None)
    mover.apply([BlockMoves(swap_outs=[(5, 1), (3, 2)])])
    device[[3, 5]] = 0
    mover.apply([BlockMoves(swap_ins=[(1, 6), (2, 7)])])
    assert values(device) == [0, 1, 2, 0, 4, 0, 5, 3]


def test_blocks_are_copied_within_the_device():
    device = device_pool()
    BlockMover([device], [0], None).apply([BlockMoves(copies=[(1, 6), (1, 7), (2, 3)])])
    assert values(device) == [0, 1, 2, 2, 4, 5, 1, 1]


def test_a_block_emptied_by_a_swap_out_may_be_filled_by_the_same_plan():
    device = device_pool()
    mover = BlockMover([device], [2], None)
    mover.apply([BlockMoves(swap_outs=[(5, 1)])])
    mover.apply([BlockMoves(swap_outs=[(4, 2)], swap_ins=[(1, 4)])])
    mover.apply([BlockMoves(swap_outs=[(6, 1)], copies=[(3, 6)])])
    mover.apply([BlockMoves(swap_ins=[(1, 1), (2, 2)])])
    assert values(device) == [0, 6, 4, 3, 5, 5, 3, 7]


def test_a_host_block_emptied_by_a_store_may_be_filled_by_the_same_plan(disk):
    device = device_pool()
    mover = BlockMover([device], [1], disk)
    mover.apply([BlockMoves(swap_outs=[(5, 1)])])
    mover.apply([BlockMoves(disk_stores=[(1, KEY)], swap_outs=[(6, 1)])])
    mover.apply([BlockMoves(swap_ins=[(1, 1)])])
    assert mover.apply([BlockMoves(disk_loads=[(KEY, 1)], swap_ins=[(1, 2)])]) == []
    assert values(device) == [0, 6, 5, 3, 4, 5, 6, 7]


def test_a_dropped_file_may_be_stored_anew_by_the_same_plan(disk):
    device = device_pool()
    mover = BlockMover([device], [2], disk)
    mover.apply([BlockMoves(swap_outs=[(5, 1), (6, 2)])])
    mover.apply([BlockMoves(disk_stores=[(1, KEY), (1, OTHER)])])
    mover.apply([BlockMoves(disk_drops=[KEY, OTHER], disk_stores=[(2, KEY)])])
    assert mover.apply([BlockMoves(disk_loads=[(KEY, 1), (OTHER, 2)], swap_ins=[(1, 1)])]) == [(0, OTHER)]
    assert values(device)[1] == 6


def test_the_groups_have_pools_of_their_own():
    devices = [device_pool(), device_pool(4, torch.float32)]
    mover = BlockMover(devices, [1, 2], None)
    mover.apply([BlockMoves(swap_outs=[(7, 1)]), BlockMoves(swap_outs=[(3, 2)])])
    mover.apply([BlockMoves(), BlockMoves(swap_ins=[(2, 1)])])
    mover.apply([BlockMoves(swap_ins=[(1, 2)]), BlockMoves()])
    assert [values(device) for device in devices] == [[0, 1, 7, 3, 4, 5, 6, 7], [0, 3, 2, 3]]


def test_no_moves_are_nothing_to_do():
    device = device_pool()
    assert BlockMover([device], [0], None).apply([]) == []
    assert values(device) == values(device_pool())


@pytest.mark.parametrize("moves", [BlockMoves(swap_outs=[(1, 2)]), BlockMoves(swap_ins=[(1, 8)]),
                                   BlockMoves(copies=[(8, 1)])])
def test_a_block_outside_its_pool_is_refused(moves):
    with pytest.raises(ValueError, match="outside"):
        BlockMover([device_pool()], [1], None).apply([moves])


@pytest.mark.parametrize("moves", [BlockMoves(disk_stores=[(1, KEY)]), BlockMoves(disk_loads=[(KEY, 1)]),
                                   BlockMoves(disk_drops=[KEY])])
def test_disk_moves_without_a_disk_are_refused(moves):
    with pytest.raises(ValueError, match="kv_disk_path"):
        BlockMover([device_pool()], [1], None).apply([moves])
