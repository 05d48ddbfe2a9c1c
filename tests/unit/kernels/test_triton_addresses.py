"""Blocks past 2^31 elements are addressed right. The pool is address space only: few of its blocks have memory."""

from __future__ import annotations

import importlib.util
import mmap
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from kvarto.kernels.triton import launch
from kvarto.kernels.triton.available import interpreted

_spec = importlib.util.spec_from_file_location("triton_batch", Path(__file__).with_name("triton_batch.py"))
sys.modules["triton_batch"] = triton_batch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(triton_batch)

pytestmark = pytest.mark.skipif(not interpreted(), reason="the address space is the host's")

MAP_NORESERVE = 0x4000  # Linux; Python's mmap does not name it before 3.13
HEADS, BLOCK_SIZE, HEAD_DIM = 2, 16, 16
BLOCK_STRIDE = 2**27
BLOCK_IDS = [18, 3, 16, 0, 17]  # from 16 on past 2^31 elements
SIDE = HEADS * BLOCK_SIZE * HEAD_DIM


@pytest.fixture
def pool() -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return mmap.mmap(-1, 19 * BLOCK_STRIDE * 2, flags=flags)


def block(pool: mmap.mmap, block_id: int) -> torch.Tensor:
    offset = block_id * BLOCK_STRIDE * 2
    return torch.frombuffer(pool, dtype=torch.float16, count=2 * SIDE, offset=offset).view(2, HEADS, BLOCK_SIZE, -1)


def layer_of(pool: mmap.mmap) -> launch.LayerCache:
    start = block(pool, 0)
    return launch.LayerCache(start[0], start[1], BLOCK_STRIDE, 19, HEADS, BLOCK_SIZE, HEAD_DIM)


def test_rows_are_written_to_far_blocks(pool: mmap.mmap) -> None:
    key, value = torch.randn(2, 3, HEADS, HEAD_DIM).half()
    launch.write_kv(key, value, layer_of(pool), torch.tensor([18 * 16 + 5, 16 * 16, 3]))
    for token, (block_id, offset) in enumerate([(18, 5), (16, 0), (0, 3)]):
        assert torch.equal(block(pool, block_id)[:, :, offset], torch.stack([key[token], value[token]]))


@pytest.mark.parametrize("num_queries", [1, 4])
def test_far_blocks_are_read(pool: mmap.mmap, num_queries: int) -> None:
    batch = triton_batch.Batch.random([(70, num_queries)], torch.float16, (2, HEADS), HEAD_DIM, BLOCK_SIZE)
    for entry, block_id in enumerate(BLOCK_IDS):
        rows = slice(entry * BLOCK_SIZE, (entry + 1) * BLOCK_SIZE)
        for side, dense in enumerate((batch.keys[0][rows], batch.values[0][rows])):
            block(pool, block_id)[side, :, :len(dense)] = dense.transpose(0, 1)
    query, starts, kv_lens = batch.tensors()
    tables = torch.tensor([BLOCK_IDS], dtype=torch.int32)
    batch.assert_close(launch.paged_attention(query, layer_of(pool), tables, starts, kv_lens, batch.scale))
