"""The Ray actor around a rank. Ray starts it, watches it and ends it; plans come through a socket.

The Head names this class to place it and must not load torch, which is why torch's users are imported by the methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import ray

from ..protos.endpoint import Endpoint
from ..protos.span_export import export_spans
from ..protos.step import RankConfig, RankReady
from .rank_server import serve_rank
from .threads import limit_spinning

if TYPE_CHECKING:
    from .collectives import Communicator


class RankActor:
    """Made an actor where it is placed. Called in this order: `serve_store` (rank 0 only), `load`, `run`."""

    def __init__(self, config: RankConfig) -> None:
        limit_spinning()
        self._config = config
        if config.otlp_traces_endpoint is not None:
            export_spans(config.otlp_traces_endpoint, f"rank {config.rank}")

    def serve_store(self) -> tuple[str, int]:
        """(host, port) at which the ranks of the group meet."""
        from .collectives import serve_store

        host = ray.util.get_node_ip_address()
        self._store, port = serve_store(host)
        return host, port

    def load(self, host: str, port: int) -> RankReady:
        """Join the group, load the weights and measure. Every rank of the group at once."""
        from .rank import Rank

        self._rank = Rank(self._config, self._join(host, port))
        return self._rank.ready(self._rank.measure())

    def run(self, num_blocks: list[int], num_host_blocks: list[int], endpoint: Endpoint) -> None:
        """Allocate the pools and execute plans until told to end. The other ranks wait for this one no longer than
        that."""
        try:
            self._rank.allocate(num_blocks, num_host_blocks)
            serve_rank(self._rank, endpoint, epoch=self._config.epoch, rank=self._config.rank,
                       lease_s=self._config.lease_s)
        finally:
            self._rank.close()

    def _join(self, host: str, port: int) -> Communicator:
        import torch

        from .collectives import SingleRank, connect

        config = self._config
        if config.tp_size == 1:
            return SingleRank()
        return connect(config.rank, config.tp_size, host, port, torch.device(config.device), config.step_timeout_s)
