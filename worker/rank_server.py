"""A rank's side of the wire: plans in, results out, until the Head says so or is not heard of any more."""

from __future__ import annotations

import logging
import time
from typing import Protocol

import zmq

from ..protos.codec import decode_to_rank, encode
from ..protos.endpoint import Endpoint, connect_dealer
from ..protos.step import Lease, RankHello, Shutdown, StepPlan, StepResult

logger = logging.getLogger(__name__)

POLL_MS = 200


class Executor(Protocol):
    def execute(self, plan: StepPlan) -> StepResult:
        """Run a step. Raises what the step raises."""


class LeaseExpiredError(RuntimeError):
    """The Head has not been heard of for the lease time: this rank belongs to nobody."""


def rank_identity(epoch: int, rank: int) -> bytes:
    """The socket identity by which a Head addresses a rank of the worker group that began with `epoch`."""
    return b"%d/%d" % (epoch, rank)


def serve_rank(executor: Executor, endpoint: Endpoint, *, epoch: int, rank: int, lease_s: float) -> None:
    """Execute the plans of one epoch. Returns on `Shutdown`; raises `LeaseExpiredError`, or what a step raised after
    telling the Head of it. A step that went well is answered by rank 0, one with `disk_loads` by every rank."""
    context = zmq.Context()
    socket = connect_dealer(context, endpoint, rank_identity(epoch, rank))
    try:
        socket.send(encode(RankHello(epoch=epoch, rank=rank)))
        heard_s = time.monotonic()
        while True:
            if not socket.poll(POLL_MS):
                if time.monotonic() - heard_s > lease_s:
                    raise LeaseExpiredError(f"rank {rank} has not heard from its Head for {lease_s:g} s")
                continue
            message = decode_to_rank(socket.recv())
            if message.epoch != epoch:
                continue
            heard_s = time.monotonic()
            if isinstance(message, Lease):
                continue
            if isinstance(message, Shutdown):
                return
            try:
                result = executor.execute(message)
            except Exception as error:
                socket.send(encode(StepResult(
                    epoch=epoch, step_id=message.step_id, rank=rank, error=f"{type(error).__name__}: {error}")))
                raise
            if rank == 0:
                socket.send(encode(result))
            elif any(moves.disk_loads for moves in message.moves):
                socket.send(encode(StepResult(
                    epoch=epoch, step_id=message.step_id, rank=rank, failed_loads=result.failed_loads)))
            heard_s = time.monotonic()
    finally:
        socket.close()
        context.term()
