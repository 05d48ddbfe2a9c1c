"""Memory for pools of blocks: on a processor in huge pages, since shuffled blocks of small pages wait for the TLB."""

from __future__ import annotations

import ctypes
import mmap

import torch

_HUGE_PAGE = 2 * 2**20


def empty_pool(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, pinned: bool = False
               ) -> torch.Tensor:
    """Uninitialised. `pinned`: host memory that a GPU copies from and to at once."""
    pool = torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
    if device.type == "cpu" and not pinned:
        _advise_huge_pages(pool.data_ptr(), pool.nbytes)
    return pool


def _advise_huge_pages(address: int, num_bytes: int) -> None:
    """Advice that the kernel may not take: the pool works without, only slower. Before its pages are first touched."""
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    begin = -(-address // _HUGE_PAGE) * _HUGE_PAGE
    end = (address + num_bytes) // _HUGE_PAGE * _HUGE_PAGE
    if advice is not None and end > begin:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(advice))
