"""Where packed weights lie."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from kvarto.kernels.packed_memory import PackedMemory

MIB = 2**20


def test_pieces_keep_what_is_written_into_them() -> None:
    memory = PackedMemory()
    sizes = [1, 0, 33, 40 * MIB, 3 * MIB, 24 * MIB, 24 * MIB, 7]  # some beyond the chunk, one with a chunk of its own
    pieces = [memory.empty(size, torch.int8).fill_(number) for number, size in enumerate(sizes)]
    for number, (piece, size) in enumerate(zip(pieces, sizes, strict=True)):
        assert piece.shape == (size,)
        assert piece.data_ptr() % 64 == 0
        assert (piece == number).all()
    assert memory.empty(5, torch.bfloat16).dtype == torch.bfloat16


def test_a_chunk_is_freed_with_its_last_piece() -> None:
    memory = PackedMemory()
    pieces = [memory.empty(30 * MIB, torch.int8).fill_(1) for _ in range(4)]  # two chunks
    first, newest = (StorageWeakRef(pieces[number].untyped_storage()) for number in (0, 3))
    del pieces[1:]
    assert not first.expired()
    del pieces
    assert first.expired()
    assert not newest.expired()


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages to advise")
@pytest.mark.parametrize("size", [1000, 40 * MIB])
def test_even_small_pieces_are_advised_to_huge_pages(size: int) -> None:
    piece = PackedMemory().empty(size, torch.int8)
    flags: list[str] = []
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= piece.data_ptr() < end
        elif inside and first == "VmFlags:":
            flags = line.split()
    assert "hg" in flags
