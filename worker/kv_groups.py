"""The KV groups of a model, and the cache that each needs on one rank."""

from __future__ import annotations

import torch

from ..kernels.kv_layout import FP8, row_elements
from ..protos.model import KVGroupSpec, ModelConfig
from .layout import TPLayout

_QUANTIZED = {"int8": torch.int8, "fp8": FP8}


def kv_groups(config: ModelConfig, max_model_len: int) -> list[KVGroupSpec]:
    """The layers of the model by cache policy, those that see everything first; the order is that of `caches` and of
    a batch's block tables. A window that no sequence of `max_model_len` tokens outgrows is none."""
    policies: dict[tuple[int | None, int], list[int]] = {}
    for layer in range(config.num_layers):
        window = config.layer_windows[layer] if config.layer_windows else None
        if window is None or window >= max_model_len:
            policy: tuple[int | None, int] = (None, 0)
        else:
            policy = (window, config.layer_sinks[layer] if config.layer_sinks else 0)
        policies.setdefault(policy, []).append(layer)
    return [KVGroupSpec(layer_ids=tuple(layers), window=window, num_sinks=num_sinks)
            for (window, num_sinks), layers in sorted(policies.items(), key=lambda item: item[0][0] is not None)]


def kv_dtype(kv_cache_dtype: str, dtype: torch.dtype) -> torch.dtype:
    """What the elements of the cache are, where the model computes in `dtype`."""
    return _QUANTIZED.get(kv_cache_dtype, dtype)


def cache_shape(config: ModelConfig, layout: TPLayout, group: KVGroupSpec, num_blocks: int, block_size: int,
                dtype: torch.dtype) -> tuple[int, int, int, int, int, int]:
    """`[num_blocks, num_layers, 2, num_kv_heads, block_size, row]` of `group` on the rank of `layout`; a row is the
    head_dim elements of `dtype` and, where that is quantized, their scale."""
    row = row_elements(dtype, config.head_dim)
    return num_blocks, len(group.layer_ids), 2, layout.num_kv_heads, block_size, row


def block_bytes(config: ModelConfig, layout: TPLayout, group: KVGroupSpec, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block of `group` on the rank of `layout`, everything that belongs to it included."""
    elements = 1
    for size in cache_shape(config, layout, group, 1, block_size, dtype):
        elements *= size
    return elements * dtype.itemsize
