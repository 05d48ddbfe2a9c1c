"""Blocks past 2^31 elements are addressed right. The pool is address space only: few of its blocks have memory."""

from __future__ import annotations

import importlib.util
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from kvarto.kernels import Residual
from kvarto.kernels.kv_layout import int4_head_bytes
from kvarto.kernels.triton import launch
from kvarto.kernels.triton.available import interpreted

_spec = importlib.util.spec_from_file_location("triton_batch", Path(__file__).with_name("triton_batch.py"))
sys.modules["triton_batch"] = triton_batch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(triton_batch)

_spec = importlib.util.spec_from_file_location("int4_batch", Path(__file__).with_name("int4_batch.py"))
sys.modules["int4_batch"] = int4_batch = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(int4_batch)

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


INT4_SIDE = HEADS * int4_head_bytes(BLOCK_SIZE, HEAD_DIM)


def int4_block(pool: mmap.mmap, block_id: int) -> torch.Tensor:
    offset = block_id * BLOCK_STRIDE * 2
    return torch.frombuffer(pool, dtype=torch.uint8, count=INT4_SIDE, offset=offset).view(HEADS, -1)


def int4_layer_of(pool: mmap.mmap) -> launch.LayerCache:
    start = int4_block(pool, 0)
    return launch.LayerCache(start, start, BLOCK_STRIDE * 2, 19, HEADS, BLOCK_SIZE, HEAD_DIM)


def test_far_blocks_are_quantized(pool: mmap.mmap) -> None:
    codes = mmap.mmap(-1, len(pool), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    rows = torch.randint(16, (2, HEADS, BLOCK_SIZE, HEAD_DIM))
    rows[0, :, :2], rows[1, :, :, :2] = torch.tensor([[0], [15]]), torch.tensor([0, 15])  # scales of 1, zeros of 0
    block(pool, 17)[:] = rows.half()
    launch.quantize_blocks(layer_of(pool), torch.tensor([17]), int4_layer_of(codes), torch.tensor([18]))
    ones = [np.ones((HEADS, size)) for size in (HEAD_DIM, BLOCK_SIZE)]
    zeros = [np.zeros((HEADS, size), np.int8) for size in (HEAD_DIM, BLOCK_SIZE)]
    expected = int4_batch.Block(rows.to(torch.uint8).numpy(), ones[0], zeros[0], ones[1], zeros[1])
    assert torch.equal(int4_block(codes, 18), expected.bytes())


@pytest.mark.parametrize("num_queries", [1, 4])
def test_far_int4_blocks_are_read(pool: mmap.mmap, num_queries: int) -> None:
    batch = int4_batch.Int4Batch.random([(70, num_queries)], torch.float16, (2, HEADS), HEAD_DIM, BLOCK_SIZE)
    tables = torch.full_like(batch.block_tables, 1)
    for entry, block_id in enumerate(BLOCK_IDS[:4]):
        int4_block(pool, block_id)[:] = batch.cache[batch.block_tables[0, entry], batch.layer]
        tables[0, entry] = block_id
    residual = Residual(batch.residual, batch.residual_layer, batch.residual_tables)
    out = launch.paged_attention(
        torch.cat(batch.own.queries), int4_layer_of(pool), tables, torch.tensor([0, num_queries]).int(),
        torch.tensor([70]).int(), batch.own.scale, residual=residual)
    batch.assert_close(out, tensor_cores=True)
