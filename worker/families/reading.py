"""From a path to a `ModelConfig`."""

from __future__ import annotations

import os

from ...protos.errors import ModelLoadError
from ...protos.model import ModelConfig
from .gguf_config import read_gguf_config
from .hf_config import read_hf_config


def read_model_config(path: str) -> ModelConfig:
    """What the model at `path` says about itself: a directory in Hugging Face format or a `.gguf` file.

    Reads headers and JSON only, never weights. Raises `ModelLoadError` naming the file and what to do about it.
    """
    path = os.path.abspath(os.path.expanduser(path))
    if os.path.isdir(path):
        config = read_hf_config(path)
    elif not os.path.exists(path):
        raise ModelLoadError(f"{path}: no such file or directory; give a model directory or a .gguf file")
    elif path.endswith(".gguf"):
        config = read_gguf_config(path)
    else:
        raise ModelLoadError(f"{path}: neither a directory nor a .gguf file; give the model's directory")
    _check(config)
    return config


def _check(config: ModelConfig) -> None:
    if config.num_heads % config.total_num_kv_heads:
        raise ModelLoadError(f"{config.path}: {config.num_heads} attention heads cannot share "
                             f"{config.total_num_kv_heads} KV heads evenly; the configuration is damaged")
    if config.head_dim % 8 or config.head_dim > 256:
        raise ModelLoadError(f"{config.path}: head_dim {config.head_dim} is not supported: the kernels take multiples "
                             "of 8 up to 256")
    if config.num_experts_per_token > config.num_experts:
        raise ModelLoadError(f"{config.path}: a token cannot go to {config.num_experts_per_token} of "
                             f"{config.num_experts} experts; the configuration is damaged")
    strange = [token for token in config.eos_token_ids if token >= config.vocab_size]
    if strange:
        raise ModelLoadError(f"{config.path}: eos token ids {strange} lie outside the vocabulary of "
                             f"{config.vocab_size}")
