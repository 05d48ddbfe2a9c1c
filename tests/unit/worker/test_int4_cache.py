"""What ranks allocate for an int4 cache, which blocks a step fills, and how many tokens that leaves room for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvarto.cluster.block_space.sizing import num_blocks
from kvarto.protos.config import EngineConfig
from kvarto.protos.model import KVGroupSpec, ModelConfig
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.step import RankCosts, RankReady, SequenceStart, SequenceStep
from kvarto.worker.batch import SequenceTable, build, lay_out
from kvarto.worker.kv_groups import block_bytes, cache_shape, kv_dtype, kv_groups
from kvarto.worker.layout import TPLayout

SMOLLM = ModelConfig(
    path="", format="hf", family="llama", hidden_size=576, intermediate_size=1536, num_layers=30, num_heads=9,
    total_num_kv_heads=3, head_dim=64, vocab_size=49152, max_position_embeddings=8192, norm_eps=1e-5)
LAYOUT = TPLayout.of(SMOLLM, 1, 0)


def test_the_residual_is_the_last_kv_group_and_has_every_layer():
    groups = kv_groups(SMOLLM, 8192, "int4")
    assert groups == [KVGroupSpec(layer_ids=tuple(range(30))), KVGroupSpec(layer_ids=tuple(range(30)), residual=True)]
    shapes = [cache_shape(SMOLLM, LAYOUT, group, 5, 16, torch.bfloat16, "int4") for group in groups]
    assert shapes == [(5, 30, 3, 16 * 64 + 2 * (64 + 16) + 64 + 8), (5, 30, 2, 3, 16, 64)]
    assert [kv_dtype(group, torch.bfloat16, "int4") for group in groups] == [torch.uint8, torch.bfloat16]
    assert [block_bytes(SMOLLM, LAYOUT, group, 16, torch.bfloat16, "int4") for group in groups] == [113_040, 368_640]


def capacity(kv_cache_dtype, block_size, device="cuda", **limits):
    """Tokens in 8 GiB, everything counted."""
    groups = kv_groups(SMOLLM, 8192, kv_cache_dtype)
    rank = RankReady(
        rank=0, kv_groups=groups,
        block_bytes=[block_bytes(SMOLLM, LAYOUT, group, block_size, torch.bfloat16, kv_cache_dtype)
                     for group in groups],
        available_bytes=2**40, available_host_bytes=2**40, kernels="", node="", pid=1,
        costs=RankCosts(copy_bytes_per_s=1e9, prefill_tokens_per_s=1e3))
    config = EngineConfig(model="m", block_size=block_size, kv_cache_memory_bytes=8 * 2**30, **limits)
    counts = num_blocks(config, [rank], 2**20, device)
    assert sum((count + 1) * size for count, size in zip(counts, rank.block_bytes, strict=True)) <= 8 * 2**30
    return counts[0] * block_size


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("block_size", "least"), [(16, 3.0), (64, 3.5)])
def test_as_it_comes_it_holds_more_than_three_times_the_tokens_of_bfloat16(block_size, least, device):
    assert EngineConfig(model="m").max_num_seqs == 256
    assert capacity("int4", block_size, device) >= least * capacity("auto", block_size, device)


@pytest.mark.parametrize(("block_size", "max_num_seqs", "ratio"), [
    (16, 256, 3.20), (16, 64, 3.23), (32, 256, 3.43), (64, 256, 3.50), (64, 128, 3.58)])
def test_capacity_over_that_of_bfloat16(block_size, max_num_seqs, ratio):
    """Without a residual it would be 3.26, 3.53 and 3.68; at 64 tokens a block one block of bfloat16 for each of 256
    sequences is 4.4% of the pool."""
    found = capacity("int4", block_size, max_num_seqs=max_num_seqs) / capacity("auto", block_size)
    assert ratio <= found < ratio + 0.01


def test_the_blocks_whose_last_slot_a_step_fills():
    rng = np.random.default_rng(0)
    size = 8
    for _ in range(50):
        table = SequenceTable(4, 200, size, 2, has_residual=True)
        wanted = [[], []]
        steps, rows = [], []
        for seq_id in range(int(rng.integers(1, 5))):
            begin, count = int(rng.integers(0, 40)), int(rng.integers(1, 30))
            rows.append(table.start(SequenceStart(
                seq_id=seq_id, seq_index=0, token_ids=[1] * (begin + count), num_prompt_tokens=begin + count,
                num_computed_tokens=begin, params=SamplingParams())))
            blocks = [rng.permutation(1000)[:9].tolist() for _ in range(2)]
            steps.append(SequenceStep(seq_id=seq_id, num_tokens=count, new_block_ids=blocks))
            for position in range(begin, begin + count):
                if position % size == size - 1:
                    for group in range(2):
                        wanted[group].append(blocks[group][position // size])
        batch = build(lay_out(steps, table), table, torch.device("cpu"))
        assert [filled.tolist() for filled in batch.filled_blocks] == wanted
        assert all(filled.dtype == torch.int64 for filled in batch.filled_blocks)


def test_without_a_residual_nobody_looks():
    table = SequenceTable(1, 20, 8, 1)
    table.start(SequenceStart(seq_id=0, seq_index=0, token_ids=[1] * 20, num_prompt_tokens=20,
                              params=SamplingParams()))
    steps = [SequenceStep(seq_id=0, num_tokens=20, new_block_ids=[[1, 2, 3]])]
    assert build(lay_out(steps, table), table, torch.device("cpu")).filled_blocks == []
