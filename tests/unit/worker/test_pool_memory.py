"""Pools of blocks on a processor."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from kvarto.kernels.huge_pages import madvise, whole_pages
from kvarto.worker import pool_memory
from kvarto.worker.pool_memory import empty_pool, populate

CPU = torch.device("cpu")


def test_shape_and_dtype():
    pool = empty_pool((3, 5), torch.float16, CPU)
    assert (pool.shape, pool.dtype, pool.device) == ((3, 5), torch.float16, CPU)
    assert empty_pool((0, 5), torch.int8, CPU).numel() == 0


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages to advise")
def test_a_large_pool_is_advised_to_huge_pages():
    pool = empty_pool((16, 2**20), torch.int8, CPU)
    address = pool.data_ptr() + pool.nbytes // 2
    flags, inside = [], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            flags = line.split()
    assert "hg" in flags


def resident_bytes(pool):
    """Of the mapping that holds the middle of a pool."""
    address, inside = pool.data_ptr() + pool.nbytes // 2, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "Rss:":
            return int(line.split()[1]) * 1024
    raise AssertionError("the pool is mapped nowhere")


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what is resident")
def test_the_beginning_of_a_pool_is_had_before_it_is_used(monkeypatch):
    monkeypatch.setattr(pool_memory, "POPULATED_BYTES", 24 * 2**20)
    pool = empty_pool((64, 2**20), torch.int8, CPU)
    # What earlier tests have freed may come again, resident as it was.
    begin, end = whole_pages(pool.data_ptr(), pool.nbytes)
    assert madvise(begin, end - begin, mmap.MADV_DONTNEED) == 0
    before = resident_bytes(pool)
    populate(pool).join(20)
    assert 20 * 2**20 <= resident_bytes(pool) - before <= 24 * 2**20


def test_a_pool_smaller_than_a_page_needs_none():
    pool = empty_pool((3, 5), torch.float16, CPU)
    populate(pool).join(20)
