"""Memory for packed weights, in huge pages. A layer of a small model is smaller than such a page: they share chunks."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from .huge_pages import HUGE_PAGE, advise_huge_pages

# More than malloc ever keeps for reuse (32 MiB): fresh memory, of which only what is used becomes resident.
_CHUNK_BYTES = 64 * 2**20
_CACHE_LINE = 64


class PackedMemory:
    """Hands out pieces of chunks; a chunk is freed with the last tensor in it, the newest one with the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """`[num_elements]`, uninitialised, aligned to a cache line."""
        num_bytes = num_elements * dtype.itemsize
        if num_bytes > _CHUNK_BYTES // 2:
            return _new_chunk(num_bytes)[:num_bytes].view(dtype)
        with self._lock:
            if self._used + num_bytes > len(self._chunk):
                self._chunk, self._used = _new_chunk(_CHUNK_BYTES), 0
            begin = self._used
            self._used += -(-num_bytes // _CACHE_LINE) * _CACHE_LINE
            return self._chunk[begin : begin + num_bytes].view(dtype)


def _new_chunk(num_bytes: int) -> Tensor:
    """At least num_bytes from the beginning of a huge page on, whole pages."""
    whole = -(-num_bytes // HUGE_PAGE) * HUGE_PAGE
    memory = torch.empty(whole + HUGE_PAGE, dtype=torch.uint8)
    begin = -memory.data_ptr() % HUGE_PAGE
    chunk = memory[begin : begin + whole]
    advise_huge_pages(chunk.data_ptr(), chunk.nbytes)
    return chunk
