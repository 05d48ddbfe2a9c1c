"""A row of logits seen as blocks of 32 tokens, whose maxima and sums tell where to look without another pass."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from ...kernels import best_tokens
from . import keys

BLOCK = 32
_CHUNK_ELEMENTS = 2**20


def row_chunks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Slices of rows whose temporaries stay in the cache: about a million elements each."""
    step = max(1, _CHUNK_ELEMENTS // num_columns)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def take_rows(tensor: torch.Tensor, rows: NDArray[np.intp]) -> torch.Tensor:
    """The rows named, each once and ascending; without a copy where they are all."""
    if len(rows) == len(tensor):
        return tensor
    return tensor[torch.from_numpy(rows).to(tensor.device)]


def block_maxima(logits: torch.Tensor) -> torch.Tensor:
    """Largest logit of each block: `[R, V]` to `[R, ceil(V / BLOCK)]`. NaN in a block makes its maximum NaN."""
    blocks, tail = _split(logits)
    maxima = blocks.amax(2)
    return torch.cat([maxima, tail.amax(1, keepdim=True)], dim=1) if tail.shape[1] else maxima


def block_sums(weights: torch.Tensor) -> torch.Tensor:
    """Sum of each block: `[R, V]` to `[R, ceil(V / BLOCK)]`, in the dtype of `weights`."""
    blocks, tail = _split(weights)
    sums = blocks.sum(2)
    return torch.cat([sums, tail.sum(1, keepdim=True)], dim=1) if tail.shape[1] else sums


def _split(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # rows: [R, V] -> [R, V // BLOCK, BLOCK], [R, V % BLOCK]
    num_blocks = rows.shape[1] // BLOCK
    return rows[:, :num_blocks * BLOCK].view(len(rows), num_blocks, BLOCK), rows[:, num_blocks * BLOCK:]


def take_blocks(logits: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the named blocks, and their columns, both `[R, B * BLOCK]`; -inf past the end of the row."""
    # logits: [R, V]; blocks: [R, B] int64
    offsets = torch.arange(BLOCK, device=logits.device)
    columns = (blocks.unsqueeze(2) * BLOCK + offsets).flatten(1)
    num_columns = logits.shape[1]
    values = logits.gather(1, columns.clamp(max=num_columns - 1))
    if num_columns % BLOCK:
        values.masked_fill_(columns >= num_columns, float("-inf"))
    return values, columns


def best_keys(logits: torch.Tensor, vocab_start: int) -> torch.Tensor:
    """Key of the best token of each row's slice, `[R]` int64. A row that holds NaN gets a key whose logit is +inf."""
    # logits: [R, V], any floating dtype
    values, columns = best_tokens(logits)
    return keys.encode(values, columns + vocab_start)


def top_keys(logits: torch.Tensor, maxima: torch.Tensor, vocab_start: int, count: int) -> torch.Tensor:
    """Keys of the best `count` tokens of each row's slice, `[R, count]` int64, in no order, PAD where there are fewer.

    The best n tokens lie in the n blocks with the best first token, so that only those are searched. A token with
    logit -inf counts as none.
    """
    # logits: [R, V]; maxima: [R, num_blocks]
    block_ids = torch.arange(maxima.shape[1], device=maxima.device)
    block_keys = keys.encode(maxima, block_ids.expand_as(maxima))
    blocks = block_keys.topk(min(count, maxima.shape[1]), dim=1, sorted=False).indices
    values, columns = take_blocks(logits, blocks)
    found = keys.encode(values, columns + vocab_start).masked_fill_(values == float("-inf"), keys.PAD)
    best = found.topk(min(count, found.shape[1]), dim=1, sorted=False).values
    return torch.nn.functional.pad(best, (0, count - best.shape[1]), value=keys.PAD)
