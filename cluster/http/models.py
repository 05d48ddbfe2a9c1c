"""The one model that this server serves."""

from __future__ import annotations

from ...protos.config import ServeConfig
from ...protos.errors import ModelNotFoundError
from ..frontend_protocol import Frontend
from .replies import Model


def check_model(name: str | None, config: ServeConfig) -> str:
    """The served model's name. Raises `ModelNotFoundError` when a request names another; it may name none."""
    if name is not None and name != config.public_name:
        raise ModelNotFoundError(
            f"the model '{name}' does not exist here; this server serves '{config.public_name}'", param="model")
    return config.public_name


def model_entry(frontend: Frontend, created: int) -> Model:
    """Its entry of `/v1/models`."""
    config = frontend.config
    return Model(id=config.public_name, created=created, root=config.model,
                 max_model_len=frontend.info.max_model_len)
