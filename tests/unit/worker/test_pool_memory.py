"""Pools of blocks on a processor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvarto.worker.pool_memory import empty_pool

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
