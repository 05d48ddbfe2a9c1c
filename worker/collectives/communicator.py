"""What tensors between the ranks of one worker group go through."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch


class Communicator(ABC):
    """Every rank makes the same calls in the same order, with contiguous tensors of the same shape and dtype. A call
    that does not end before its deadline, or whose peer is gone, raises `UnavailableError`; the communicator is dead
    then."""

    name: str
    """Of what carries the tensors, for people."""
    rank: int
    world_size: int

    @abstractmethod
    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` (float32, bfloat16 or float16) over the ranks, in place; returns it. The same bits on every
        rank."""

    @abstractmethod
    def all_gather_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[world_size, *tensor.shape]`: entry r is what rank r gave."""

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Overwrite `tensor` with that of rank `src`, in place; returns it."""

    @abstractmethod
    def close(self) -> None:
        """Leave the group and release sockets and threads: collectives that wait for this rank fail. None may
        follow."""


class SingleRank(Communicator):
    """A group of one: nothing moves."""

    name = "none"
    rank = 0
    world_size = 1

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def all_gather_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.unsqueeze(0)

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:  # noqa: ARG002
        return tensor

    def close(self) -> None:
        return None


def sum_in_order(parts: torch.Tensor) -> torch.Tensor:
    """`[world_size, ...]` -> float32 `[...]`: added in rank order, whatever the size of the message."""
    total = parts[0].float()
    for part in parts[1:]:
        total += part
    return total
