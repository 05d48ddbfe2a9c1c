"""A worker group in this process."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from ...protos.config import EngineConfig
from ...protos.step import RankCosts
from ...worker.threads import limit_spinning
from ..engine.engine import Engine
from ..engine.inline import InlineWorkerGroup
from ..metrics import Metrics
from ..resolve import resolve
from .model import load_model_config

if TYPE_CHECKING:
    from ...worker.rank import Rank


def start_inline(config: EngineConfig, metrics: Metrics) -> Engine:
    """Load the model and allocate its pools. Raises `ConfigError` and its kin."""
    # Before torch is imported, which is why its users are imported here.
    limit_spinning()
    from ...worker.collectives import Communicator, SingleRank, thread_group
    from ...worker.devices import has_cuda
    from ...worker.rank import Rank

    resolved = resolve(config, load_model_config(config.model), has_cuda=has_cuda())
    tp_size = config.tensor_parallel_size
    comms: list[Communicator] = [SingleRank()]
    if tp_size > 1:
        comms = thread_group(tp_size, resolved.device, config.step_timeout_s)
    ranks = [Rank(resolved.rank_config(rank, epoch=1), comm) for rank, comm in enumerate(comms)]
    ready = [rank.ready(cost) for rank, cost in zip(ranks, _measure(ranks), strict=True)]
    blocks, host_blocks = resolved.blocks(ready)
    for rank in ranks:
        rank.allocate(blocks, host_blocks)
    return resolved.engine(ready, blocks, host_blocks, InlineWorkerGroup(ranks), 1, metrics)


def _measure(ranks: Sequence[Rank]) -> list[RankCosts]:
    """What each rank measures; they do it together, as a forward pass is theirs in common."""
    if len(ranks) == 1:
        return [ranks[0].measure()]

    def measure(rank: Rank) -> RankCosts:
        try:
            return rank.measure()
        except BaseException:
            rank.close()
            raise

    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(measure, ranks))
