"""Ranks on the CPUs of one host, through memory that they share."""

from __future__ import annotations

import torch

from ...kernels import ExchangeError
from ...kernels.exchange_ops import Exchange
from ...protos.errors import UnavailableError
from .communicator import Communicator


class SharedMemoryCommunicator(Communicator):
    """Over an `Exchange`: sums in float32 in rank order. A rank that dies is noticed within some hundredths of a
    second, one that closes at once, and one that is stopped at the deadline. Made by
    `rendezvous.connect`."""

    name = "shared memory"

    def __init__(self, exchange: Exchange, timeout_s: float) -> None:
        """`timeout_s`: the exchange's, for messages."""
        self.rank = exchange.rank
        self.world_size = exchange.world_size
        self.exchange = exchange
        self._timeout_s = timeout_s

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        try:
            return self.exchange.all_reduce(tensor)
        except ExchangeError as error:
            raise self._lost("all_reduce", error) from error

    def all_gather_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        try:
            return self.exchange.all_gather(tensor.contiguous())
        except ExchangeError as error:
            raise self._lost("all_gather_rows", error) from error

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        try:
            return self.exchange.broadcast(tensor, src)
        except ExchangeError as error:
            raise self._lost("broadcast", error) from error

    def close(self) -> None:
        self.exchange.abort()

    def _lost(self, name: str, error: ExchangeError) -> UnavailableError:
        return UnavailableError(
            f"{name} on rank {self.rank} of {self.world_size} failed (deadline {self._timeout_s:g} s): {error}; the "
            "worker group must be started again")
