"""One rank in this process."""

from __future__ import annotations

from ...protos.config import EngineConfig
from ...worker.collectives import SingleRank
from ...worker.devices import has_cuda
from ...worker.rank import Rank
from ..engine.engine import Engine
from ..engine.inline import InlineWorkerGroup
from ..metrics import Metrics
from ..resolve import Resolved, resolve
from .model import load_model_config


def start_inline(config: EngineConfig, metrics: Metrics) -> tuple[Resolved, Engine]:
    """Load the model and allocate its pools. Raises `ConfigError` and its kin."""
    resolved = resolve(config, load_model_config(config.model), has_cuda=has_cuda())
    rank = Rank(resolved.rank_config(rank=0, epoch=1), SingleRank())
    ready = rank.ready()
    blocks = resolved.blocks([ready])
    rank.allocate(blocks)
    return resolved, resolved.engine([ready], blocks, InlineWorkerGroup(rank), 1, metrics)
