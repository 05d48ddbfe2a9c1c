"""A worker group in this process."""

from __future__ import annotations

from ...protos.config import EngineConfig
from ...worker.threads import limit_spinning
from ..engine.engine import Engine
from ..engine.inline import InlineWorkerGroup
from ..metrics import Metrics
from ..resolve import resolve
from .model import load_model_config


def start_inline(config: EngineConfig, metrics: Metrics) -> Engine:
    """Load the model and allocate its pools. Raises `ConfigError` and its kin."""
    # Before torch is imported, which is why its users are imported here.
    limit_spinning()
    from ...worker.collectives import Communicator, SingleRank, ThreadCommunicator
    from ...worker.devices import has_cuda
    from ...worker.rank import Rank

    resolved = resolve(config, load_model_config(config.model), has_cuda=has_cuda())
    tp_size = config.tensor_parallel_size
    comms: list[Communicator] = [SingleRank()]
    if tp_size > 1:
        comms = [*ThreadCommunicator.group(tp_size, config.step_timeout_s)]
    ranks = [Rank(resolved.rank_config(rank, epoch=1), comm) for rank, comm in enumerate(comms)]
    ready = [rank.ready() for rank in ranks]
    blocks = resolved.blocks(ready)
    for rank in ranks:
        rank.allocate(blocks)
    return resolved.engine(ready, blocks, InlineWorkerGroup(ranks), 1, metrics)
