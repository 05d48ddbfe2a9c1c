"""From a model's name to what its files say of it. Imports neither torch nor Ray."""

from __future__ import annotations

from ...protos.model import ModelConfig
from ...worker.families import read_model_config
from ..model_hub import resolve_model


def load_model_config(name: str) -> ModelConfig:
    """Find the model (fetching it if it is an alias or a hub id) and read its configuration. Raises
    `ModelLoadError`."""
    return read_model_config(resolve_model(name))
