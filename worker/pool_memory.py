"""Memory for pools of blocks: on a processor in huge pages, since shuffled blocks of small pages wait for the TLB."""

from __future__ import annotations

import torch

from ..kernels.huge_pages import advise_huge_pages


def empty_pool(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, pinned: bool = False
               ) -> torch.Tensor:
    """Uninitialised. `pinned`: host memory that a GPU copies from and to at once."""
    pool = torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
    if device.type == "cpu" and not pinned:
        advise_huge_pages(pool.data_ptr(), pool.nbytes)
    return pool
