"""The KV groups of a model, and the cache that each needs on one rank."""

from __future__ import annotations

import torch

from ..protos.model import KVGroupSpec, ModelConfig
from .layout import TPLayout


def kv_groups(config: ModelConfig) -> list[KVGroupSpec]:
    """The layers of the model by cache policy; their order is that of `caches` and of a batch's block tables."""
    return [KVGroupSpec(layer_ids=tuple(range(config.num_layers)))]


def cache_shape(config: ModelConfig, layout: TPLayout, group: KVGroupSpec, num_blocks: int,
                block_size: int) -> tuple[int, int, int, int, int, int]:
    """`[num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]` of `group` on the rank of `layout`."""
    return num_blocks, len(group.layer_ids), 2, layout.num_kv_heads, block_size, config.head_dim


def block_bytes(config: ModelConfig, layout: TPLayout, group: KVGroupSpec, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block of `group` on the rank of `layout`."""
    elements = 1
    for size in cache_shape(config, layout, group, 1, block_size):
        elements *= size
    return elements * dtype.itemsize
