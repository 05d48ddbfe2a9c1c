"""Attention of one layer on one rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..kernels import PackedLinear, linear, paged_attention, write_kv
from ..protos.errors import ConfigError
from ..protos.model import ModelConfig
from .batch import ForwardBatch
from .norms import Norm
from .rope import Angles, rotate


def check_attention(config: ModelConfig, max_model_len: int) -> None:
    """Raises `ConfigError` where the attention of the model is not what the kernels compute."""
    window = min((window for window in config.layer_windows if window is not None), default=max_model_len)
    if window < max_model_len:
        raise ConfigError(f"{config.path}: layers of this model see only the last {window} tokens, which is not "
                          f"supported yet: set max_model_len to at most {window}", param="max_model_len")
    if config.attention_softcap is not None:
        raise ConfigError(f"{config.path}: soft caps on attention scores (attn_logit_softcapping "
                          f"{config.attention_softcap:g}) are not supported yet")


@dataclass(frozen=True, slots=True)
class Attention:
    """The heads that this rank holds."""

    group: int
    """KV group whose cache the layer uses, and the layer's place in it."""
    layer_in_group: int
    angles: int | None
    """Which of the model's rotary tables turns the heads; None: positions are learned."""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv: PackedLinear
    q_norm: Norm | None
    k_norm: Norm | None
    o: PackedLinear

    def __call__(self, x: torch.Tensor, angles: list[Angles], batch: ForwardBatch, caches: list[torch.Tensor]
                 ) -> torch.Tensor:
        """Writes K and V of `x` into the cache. Returns what this rank adds to the sum over ranks."""
        # x: [num_tokens, hidden_size]; qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim]
        num_heads, num_kv_heads = self.num_heads, self.num_kv_heads
        qkv = linear(x, self.qkv).view(x.shape[0], num_heads + 2 * num_kv_heads, self.head_dim)
        qk, value = qkv[:, :num_heads + num_kv_heads], qkv[:, num_heads + num_kv_heads:]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :num_heads]), self.k_norm(qk[:, num_heads:])), dim=1)
        if self.angles is not None:
            qk = rotate(qk, *angles[self.angles])
        query, key = qk[:, :num_heads], qk[:, num_heads:]
        cache, place = caches[self.group], self.layer_in_group
        write_kv(key, value, cache, place, batch.slot_mapping[self.group])
        attended = paged_attention(query, cache, place, batch.block_tables[self.group], batch.query_start_loc,
                                   batch.kv_lens, self.scale)
        return linear(attended.flatten(1), self.o)
