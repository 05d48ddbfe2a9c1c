"""The Ray actor around a rank. Ray starts it, watches it and ends it; plans come through a socket."""

from __future__ import annotations

import ray
import torch

from ..protos.endpoint import Endpoint
from ..protos.step import RankConfig, RankReady
from .collectives import Communicator, SingleRank, connect, serve_store
from .rank import Rank
from .rank_server import serve_rank


class RankActor:
    """Made an actor where it is placed. Called in this order: `serve_store` (rank 0 only), `load`, `run`."""

    def __init__(self, config: RankConfig) -> None:
        self._config = config

    def serve_store(self) -> tuple[str, int]:
        """(host, port) at which the ranks of the group meet."""
        host = ray.util.get_node_ip_address()
        self._store, port = serve_store(host)
        return host, port

    def load(self, host: str, port: int) -> RankReady:
        """Join the group and load the weights."""
        comm: Communicator = SingleRank()
        if self._config.tp_size > 1:
            comm = connect(self._config.rank, self._config.tp_size, host, port, torch.device(self._config.device),
                           self._config.step_timeout_s)
        self._rank = Rank(self._config, comm)
        return self._rank.ready()

    def run(self, num_blocks: list[int], endpoint: Endpoint) -> None:
        """Allocate the pools and execute plans until told to end."""
        self._rank.allocate(num_blocks)
        serve_rank(self._rank, endpoint, epoch=self._config.epoch, rank=self._config.rank,
                   lease_s=self._config.lease_s)
