"""The decoder of every family: embedding, layers of attention and MLP over a residual stream, LM head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..kernels import PackedLinear, linear, pack_linear, paged_attention, write_kv
from ..protos.model import ModelConfig
from .batch import ForwardBatch
from .collectives import Communicator
from .families import family_of
from .kv_groups import block_bytes, cache_shape, kv_groups
from .layout import TPLayout
from .rope import rotary_tables, rotate
from .shard import ShardReader
from .weights import WeightSource

__all__ = ["Decoder", "block_bytes", "cache_shape", "kv_groups"]

_ACTIVATIONS = {"silu": F.silu}


@dataclass(frozen=True, slots=True)
class _Layer:
    group: int
    """KV group whose cache the layer uses, and the layer's place in it."""
    layer_in_group: int
    attention_norm: torch.Tensor
    qkv: PackedLinear
    o: PackedLinear
    mlp_norm: torch.Tensor
    gate_up: PackedLinear
    down: PackedLinear


class Decoder:
    """One rank's part of a model. Every rank calls `forward` with the same batch; `load` makes it."""

    def __init__(self, config: ModelConfig, layout: TPLayout, shard: ShardReader, device: torch.device,
                 comm: Communicator, max_model_len: int) -> None:
        self.config = config
        self.layout = layout
        self.kv_groups = kv_groups(config)
        self._comm = comm
        self._activation = _ACTIVATIONS[family_of(config).activation]
        self._cos, self._sin = rotary_tables(config, max_model_len, device)
        self._embedding = shard.rows("embedding")
        self._lm_head = (pack_linear(self._embedding) if config.tie_word_embeddings
                         else shard.column_parallel(("lm_head",)))
        self._final_norm = shard.whole("final_norm")
        places = {layer: (group, place) for group, spec in enumerate(self.kv_groups)
                  for place, layer in enumerate(spec.layer_ids)}
        self._layers = [
            _Layer(
                *places[layer],
                attention_norm=shard.whole("attention_norm", layer),
                qkv=shard.column_parallel(("q", "k", "v"), layer),
                o=shard.row_parallel("o", layer),
                mlp_norm=shard.whole("mlp_norm", layer),
                gate_up=shard.column_parallel(("gate", "up"), layer),
                down=shard.row_parallel("down", layer),
            )
            for layer in range(config.num_layers)
        ]

    @classmethod
    @torch.inference_mode()
    def load(cls, config: ModelConfig, layout: TPLayout, source: WeightSource, dtype: torch.dtype,
             device: torch.device, comm: Communicator, max_model_len: int | None = None) -> Decoder:
        """Read this rank's weights from `source`, as `dtype` on `device`.

        `max_model_len` bounds the positions that a batch may name; default: what the model was made for. Raises
        `ModelLoadError` when the files cannot be read.
        """
        shard = ShardReader(config, layout, source, dtype, device)
        return cls(config, layout, shard, device, comm, max_model_len or config.max_position_embeddings)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, caches: list[torch.Tensor]) -> torch.Tensor:
        """Run the batch, writing its K and V into `caches` (one per KV group, `cache_shape`). Returns
        `[T, hidden_size]` in the model's dtype, the final norm applied; the same on every rank. An inference tensor.

        Raises `UnavailableError` when another rank is gone.
        """
        # x: [num_tokens, hidden_size], the residual stream
        cos, sin = self._cos[batch.positions].unsqueeze(1), self._sin[batch.positions].unsqueeze(1)
        x = self._embed(batch.token_ids)
        for layer in self._layers:
            x = x + self._attention(layer, self._norm(x, layer.attention_norm), cos, sin, batch, caches)
            x = x + self._mlp(layer, self._norm(x, layer.mlp_norm))
        return self._norm(x, self._final_norm)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[R, hidden_size]`, rows of what `forward` returned -> float32 `[R, local_vocab]`: of the token ids in
        `layout.vocab`. An inference tensor."""
        return linear(hidden, self._lm_head).float()

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        # token_ids: [num_tokens] -> [num_tokens, hidden_size]
        if self.layout.tp_size == 1:
            return F.embedding(token_ids, self._embedding)
        local_ids = token_ids - self.layout.vocab.start
        elsewhere = (local_ids < 0) | (local_ids >= len(self.layout.vocab))
        rows = F.embedding(local_ids.masked_fill(elsewhere, 0), self._embedding)
        return self._comm.all_reduce(rows.masked_fill_(elsewhere.unsqueeze(1), 0))

    def _attention(self, layer: _Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, batch: ForwardBatch,
                   caches: list[torch.Tensor]) -> torch.Tensor:
        # qkv: [num_tokens, num_heads + 2 * num_kv_heads, head_dim]
        num_heads, num_kv_heads = self.layout.num_heads, self.layout.num_kv_heads
        qkv = linear(x, layer.qkv).view(x.shape[0], num_heads + 2 * num_kv_heads, self.config.head_dim)
        rotated = rotate(qkv[:, :num_heads + num_kv_heads], cos, sin)
        query, key, value = rotated[:, :num_heads], rotated[:, num_heads:], qkv[:, num_heads + num_kv_heads:]
        cache, place = caches[layer.group], layer.layer_in_group
        write_kv(key, value, cache, place, batch.slot_mapping[layer.group])
        attended = paged_attention(query, cache, place, batch.block_tables[layer.group], batch.query_start_loc,
                                   batch.kv_lens, self.config.head_dim**-0.5)
        return self._comm.all_reduce(linear(attended.flatten(1), layer.o))

    def _mlp(self, layer: _Layer, x: torch.Tensor) -> torch.Tensor:
        gate, up = linear(x, layer.gate_up).chunk(2, dim=-1)
        return self._comm.all_reduce(linear(self._activation(gate) * up, layer.down))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # The square mean is taken in float32 and the weight applied in the model's dtype, as Transformers does.
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.config.norm_eps)
        return weight * (wide * scale).to(x.dtype)
