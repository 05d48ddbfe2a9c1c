"""What moving blocks and computing cost here, measured: the scheduler weighs one against the other."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from ..protos.sampling import SamplingParams
from ..protos.step import BlockMoves, RankConfig, RankCosts, SequenceStart, SequenceStep
from .batch import SequenceTable, build, lay_out
from .block_mover import BlockMover
from .decoder import Decoder
from .kv_groups import cache_shape, kv_dtype

PREFILL_TOKENS = 128
"""Enough that a token costs what it costs in a long prompt; more would only make the start longer."""
COPY_BYTES = 32 * 2**20
"""Of blocks in each pool: together they should not fit the processor's caches."""
MAX_COPY_BLOCKS = 256
COPY_REPEATS = 3


@torch.inference_mode()
def measure_costs(decoder: Decoder, config: RankConfig, dtype: torch.dtype, device: torch.device) -> RankCosts:
    """`dtype` of the model. Takes some tenths of a second and memory that is free again afterwards. All ranks of a
    group at once."""
    return RankCosts(copy_bytes_per_s=_copy_bytes_per_s(decoder, config, dtype, device),
                     prefill_tokens_per_s=_prefill_tokens_per_s(decoder, config, dtype, device))


def _caches(
    decoder: Decoder, num_blocks: int, config: RankConfig, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    return [
        torch.zeros(cache_shape(decoder.config, decoder.layout, group, num_blocks + 1, config.block_size, dtype,
                                config.kv_cache_dtype),
                    dtype=kv_dtype(group, dtype, config.kv_cache_dtype), device=device)
        for group in decoder.kv_groups]


def _copy_bytes_per_s(decoder: Decoder, config: RankConfig, dtype: torch.dtype, device: torch.device) -> float:
    one_of_each = sum(cache[0].nbytes for cache in _caches(decoder, 0, config, dtype, device))
    count = max(4, min(MAX_COPY_BLOCKS, COPY_BYTES // one_of_each))
    caches = _caches(decoder, count, config, dtype, device)
    mover = BlockMover(caches, [count] * len(caches), disk=None)
    pairs = [(block_id, block_id) for block_id in range(1, count + 1)]

    def out_and_in() -> None:
        mover.apply([BlockMoves(swap_outs=pairs) for _ in caches])
        mover.apply([BlockMoves(swap_ins=pairs) for _ in caches])
        mover.synchronize()

    # The first run pays for the host pool's fresh pages.
    seconds = min(_seconds(out_and_in) for _ in range(1 + COPY_REPEATS))
    return 2 * count * one_of_each / seconds


def _prefill_tokens_per_s(
    decoder: Decoder, config: RankConfig, dtype: torch.dtype, device: torch.device
) -> float:
    count = min(PREFILL_TOKENS, config.max_model_len, config.max_num_batched_tokens)
    num_blocks = -(-count // config.block_size)
    caches = _caches(decoder, num_blocks, config, dtype, device)

    def prefill(num_tokens: int) -> None:
        table = SequenceTable(1, count, config.block_size, len(caches),
                              has_residual=decoder.kv_groups[-1].residual)
        table.start(SequenceStart(
            seq_id=0, seq_index=0, token_ids=[0] * num_tokens, num_prompt_tokens=num_tokens,
            params=SamplingParams(temperature=0.0)))
        step = SequenceStep(
            seq_id=0, num_tokens=num_tokens, new_block_ids=[list(range(1, num_blocks + 1))] * len(caches))
        decoder.forward(build(lay_out([step], table), table, device), caches)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    # The first forward pays for the weights' and the kernels' first use.
    prefill(1)
    return count / _seconds(lambda: prefill(count))


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
