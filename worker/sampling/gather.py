"""What the sampler needs of the ranks' communicator."""

from __future__ import annotations

from typing import Protocol

import torch


class Gather(Protocol):
    """A communicator over the ranks of one worker group, in the order of their vocabulary slices."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def all_gather_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[...]`, of one shape and dtype on all ranks, to `[world_size, ...]`: entry r is rank r's tensor.

        The sampler gathers int64 only. Every rank makes the same sequence of calls.
        """
        ...
