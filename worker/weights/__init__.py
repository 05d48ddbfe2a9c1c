"""Reading weights from disk, a slice at a time."""

from __future__ import annotations

from ...protos.model import ModelConfig
from ..families import family_of
from .gguf_source import GGUFSource
from .safetensors_source import SafetensorsSource
from .source import WeightSource, check_tensors

__all__ = ["WeightSource", "open_weights"]


def open_weights(config: ModelConfig) -> WeightSource:
    """Open the files of the model and check, without reading a weight, that every tensor it needs is there in its
    shape and that no file is cut short. Raises `ModelLoadError` naming the tensor and the file."""
    source: WeightSource
    if config.format == "gguf":
        source = GGUFSource(config)
    else:
        source = SafetensorsSource(config.path, family_of(config).hf_prefix)
    check_tensors(source, config)
    return source
