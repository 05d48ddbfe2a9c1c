"""How the ranks of a group meet, and what they find to carry their tensors."""

from __future__ import annotations

import logging
from datetime import timedelta

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but missing in the stubs

from ...protos.errors import ResourcesError, UnavailableError
from .communicator import Communicator
from .process_group import TorchCommunicator
from .region import NotSharedError, open_exchange
from .shared_memory import SharedMemoryCommunicator

logger = logging.getLogger(__name__)


def serve_store(host: str, port: int = 0) -> tuple[TCPStore, int]:
    """Bind the rendezvous of a group on rank 0's `host`; port 0 takes a free one. Returns the store, to be kept as
    long as the group lives, and its port. Raises `ResourcesError` when the port cannot be bound."""
    try:
        store = TCPStore(host, port, is_master=True, wait_for_workers=False)
    except RuntimeError as error:
        raise ResourcesError(f"cannot bind the rendezvous of a worker group to {host}:{port}: {error}") from error
    return store, store.port


def connect(rank: int, world_size: int, host: str, port: int, device: torch.device,
            timeout_s: float) -> Communicator:
    """Join the group whose store listens on `host:port`; returns once all `world_size` ranks have. `timeout_s` is the
    deadline of this and of every collective. Raises `UnavailableError`.

    Ranks on the CPUs of one host share memory where the native kernels are there, others go by Gloo; GPUs by NCCL.
    """
    try:
        store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
        comm = _join(store, rank, world_size, device, timeout_s)
    except RuntimeError as error:
        raise UnavailableError(
            f"rank {rank} of {world_size} could not join its worker group at {host}:{port} within {timeout_s:g} s: "
            f"{error}") from error
    logger.info("rank %d of %d has joined its worker group: %s", rank, world_size, comm.name)
    return comm


def _join(store: TCPStore, rank: int, world_size: int, device: torch.device, timeout_s: float) -> Communicator:
    if device.type == "cpu":
        try:
            return SharedMemoryCommunicator(open_exchange(store, rank, world_size, timeout_s), timeout_s)
        except NotSharedError as error:
            logger.warning("the ranks share no memory, and are slower for it: %s", error)
    return TorchCommunicator(store, rank, world_size, device, timeout_s)
