"""compact_rows against a loop over rows, in every layout of the cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kvarto.kernels import compact_rows
from kvarto.kernels.kv_layout import FP8, SCALE_BYTES, quantized, row_elements

CACHE_DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, FP8]


def random_cache(num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    """Bytes of any value: NaN and infinities too, which are moved as they are."""
    shape = (num_blocks, 3, 2, num_kv_heads, block_size, row_elements(dtype, head_dim) * dtype.itemsize)
    return torch.randint(-128, 128, shape, dtype=torch.int8).view(dtype)


def moved(cache: Tensor, layer: int, moves: list[tuple[int, int, int, int, int]]) -> Tensor:
    """The bytes of a cache after (head, source block, offset, target block, offset) have been moved, one by one."""
    block_size, row = cache.shape[4], cache.shape[5]
    head_dim = row - SCALE_BYTES if quantized(cache.dtype) else row
    heads = cache.clone().view(torch.int8).flatten(-2)  # [num_blocks, num_layers, 2, num_kv_heads, bytes]
    row_bytes = head_dim * cache.element_size()
    scales = block_size * row_bytes
    for head, source, source_offset, target, target_offset in moves:
        for begin, size in [(0, row_bytes)] + ([(scales, SCALE_BYTES)] if quantized(cache.dtype) else []):
            from_bytes = slice(begin + source_offset * size, begin + (source_offset + 1) * size)
            to_bytes = slice(begin + target_offset * size, begin + (target_offset + 1) * size)
            heads[target, layer, :, head, to_bytes] = heads[source, layer, :, head, from_bytes]
    return heads


@pytest.mark.usefixtures("any_backend")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", CACHE_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_kv_heads", "block_size", "head_dim"), [(3, 16, 64), (1, 8, 80), (2, 32, 128), (2, 128, 24)])
def test_kept_rows_are_moved_and_nothing_else_changes(
    num_kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype, threads: int
) -> None:
    torch.set_num_threads(threads)
    kept = [0, 1, block_size, block_size + 1, 3 * block_size - 1]
    cache = random_cache(5 * 9 + 2, num_kv_heads, block_size, head_dim, dtype)
    ids = torch.randperm(5 * 9 + 2).int()
    sources, targets = ids[: 5 * 6].view(5, 6), ids[5 * 6 : 5 * 9].view(5, 3)
    sources[0], targets[0] = -7, 2**31 - 1  # nothing is kept of it
    targets[1, 1:] = -7
    rows = torch.full((5, num_kv_heads, 3 * block_size), -7, dtype=torch.int32)
    moves = []
    for seq, count in enumerate(kept):
        for head in range(num_kv_heads):
            rows[seq, head, :count] = chosen = torch.randperm(6 * block_size)[:count].sort()[0].int()
            for i, row in enumerate(chosen.tolist()):
                source, target = int(sources[seq, row // block_size]), int(targets[seq, i // block_size])
                moves.append((head, source, row % block_size, target, i % block_size))
    expected = moved(cache, 1, moves)
    compact_rows(cache, 1, rows, sources.contiguous(), targets.contiguous(), torch.tensor(kept, dtype=torch.int32))
    assert torch.equal(cache.view(torch.int8).flatten(-2), expected)


@pytest.mark.usefixtures("any_backend")
def test_a_row_may_be_kept_twice_and_in_any_order() -> None:
    cache = random_cache(4, 1, 8, 16, torch.float32)
    expected = moved(cache, 0, [(0, 2, 5, 1, 0), (0, 3, 1, 1, 1), (0, 2, 5, 1, 2)])
    tables = torch.tensor([[2, 3]], dtype=torch.int32), torch.tensor([[1]], dtype=torch.int32)
    compact_rows(cache, 0, torch.tensor([[[5, 9, 5]]], dtype=torch.int32), *tables, torch.tensor([3]).int())
    assert torch.equal(cache.view(torch.int8).flatten(-2), expected)


@pytest.mark.usefixtures("any_backend")
def test_a_batch_without_sequences_moves_nothing() -> None:
    cache, none = random_cache(2, 1, 8, 16, torch.float32), torch.empty(0, dtype=torch.int32)
    before = cache.clone().view(torch.int8)
    compact_rows(cache, 0, none.view(0, 1, 4), none.view(0, 3), none.view(0, 1), none)
    assert torch.equal(cache.view(torch.int8), before)


def _arguments() -> dict[str, object]:
    return {
        "cache": random_cache(6, 2, 16, 64, torch.float32),
        "layer": 1,
        "rows": torch.tensor([[[0, 17], [3, 4]], [[31, 0], [1, 2]]], dtype=torch.int32),
        "source_tables": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
        "target_tables": torch.tensor([[4], [5]], dtype=torch.int32),
        "num_kept": torch.tensor([2, 1], dtype=torch.int32),
    }


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"cache": torch.zeros(5, 2, 2, 2, 16, 64, dtype=torch.float64)}, TypeError, "cache must be float32"),
        ({"layer": -1}, ValueError, "layer must be in"),
        ({"rows": torch.zeros(2, 2, 2)}, TypeError, "rows must be torch.int32"),
        ({"rows": torch.zeros(2, 2, dtype=torch.int32)}, ValueError, "rows must have shape"),
        ({"rows": torch.zeros(2, 3, 2, dtype=torch.int32)}, ValueError, "rows must have shape"),
        ({"rows": torch.zeros(2, 2, 4, dtype=torch.int32)[..., ::2]}, ValueError, "rows must be contiguous"),
        ({"rows": torch.full((2, 2, 2), 32, dtype=torch.int32)}, ValueError, "rows: sequence 0 keeps a row outside"),
        ({"rows": torch.tensor([[[0, 1]] * 2, [[0, 1], [-1, 0]]]).int()}, ValueError, "rows: sequence 1 keeps a row"),
        ({"source_tables": torch.zeros(1, 2, dtype=torch.int32)}, ValueError, "source_tables must have shape"),
        ({"source_tables": torch.zeros(2, 2)}, TypeError, "source_tables must be torch.int32"),
        ({"source_tables": torch.tensor([[0, 6], [2, 3]]).int()}, ValueError, "source_tables: sequence 0 names"),
        ({"target_tables": torch.tensor([4, 5]).int()}, ValueError, r"target_tables must be \[num_seqs, max_blocks\]"),
        ({"target_tables": torch.tensor([[4], [-1]]).int()}, ValueError, "target_tables: sequence 1 names"),
        ({"num_kept": torch.tensor([2, 1])}, TypeError, "num_kept must be torch.int32"),
        ({"num_kept": torch.tensor([2]).int()}, ValueError, "rows must have shape"),
        ({"num_kept": torch.tensor([2, 3]).int()}, ValueError, "num_kept: sequence 1"),
        ({"num_kept": torch.tensor([-1, 1]).int()}, ValueError, "num_kept: sequence 0"),
        ({"target_tables": torch.zeros(2, 0).int()}, ValueError, "num_kept: sequence 0"),
    ],
)
def test_bad_input_is_refused_by_name_and_nothing_is_moved(
    wrong: dict[str, object], error: type[Exception], message: str
) -> None:
    arguments = _arguments() | wrong
    before = arguments["cache"].clone()
    with pytest.raises(error, match=message):
        compact_rows(**arguments)  # type: ignore[arg-type]
    assert torch.equal(arguments["cache"].view(torch.int8), before.view(torch.int8))
