"""One rank in this process."""

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
    from ...worker.collectives import SingleRank
    from ...worker.devices import has_cuda
    from ...worker.rank import Rank

    resolved = resolve(config, load_model_config(config.model), has_cuda=has_cuda())
    rank = Rank(resolved.rank_config(rank=0, epoch=1), SingleRank())
    ready = rank.ready()
    blocks = resolved.blocks([ready])
    rank.allocate(blocks)
    return resolved.engine([ready], blocks, InlineWorkerGroup(rank), 1, metrics)
