"""The decoder of every family: embedding, layers of attention and MLP over a residual stream, LM head."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from ..kernels import Mask, NotRecordableError, best_tokens, linear, take_rows
from ..protos.model import ModelConfig
from ..protos.spans import Span
from .attention import Attention
from .batch import ForwardBatch
from .collectives import Communicator
from .far_sinks import FarAngles, FarSinkRule
from .forward_span import forward_span
from .kv_groups import block_bytes, cache_shape, kv_groups
from .layout import TPLayout
from .mlp import Experts, Mlp
from .norms import Norm
from .observer import Observer
from .recorded_forward import Best, RecordedForward
from .rope import Angles, rotary_tables
from .shard import ShardReader
from .weights import WeightSource

__all__ = ["Decoder", "block_bytes", "cache_shape", "kv_groups"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Layer:
    attention_norm: Norm
    attention: Attention
    attention_post_norm: Norm | None
    mlp_norm: Norm | None
    mlp: Mlp | Experts
    mlp_post_norm: Norm | None


class Decoder:
    """One rank's part of a model. Every rank calls `forward` with the same batch; `load` makes it."""

    def __init__(self, config: ModelConfig, layout: TPLayout, shard: ShardReader, device: torch.device,
                 comm: Communicator, max_model_len: int, kv_cache_dtype: str) -> None:
        self.config = config
        self.layout = layout
        self.kv_groups = kv_groups(config, max_model_len, kv_cache_dtype)
        self._far_sinks = [FarSinkRule.of(config, group) for group in self.kv_groups]
        self._comm = comm
        self._recorded: RecordedForward | None = None
        self._recorded_caches: list[torch.Tensor] = []
        self._embedding = shard.rows("embedding")
        # A number of the model's dtype, as in training.
        self._embedding_scale = float(torch.tensor(
            config.hidden_size**0.5 if shard.family.scales_embedding else 1.0, dtype=self._embedding.dtype))
        self._parallel = shard.family.parallel
        self._positions = shard.positions(max_model_len)
        self._rotary = []
        if self._positions is None:
            self._rotary = [rotary_tables(config, max_model_len, device, local=local)
                            for local in ((False,) if config.local_rope_theta is None else (False, True))]
        self._lm_head = shard.lm_head(self._embedding)
        self._final_norm = shard.norm("final_norm")
        places = {layer: (group, place) for group, spec in enumerate(self.kv_groups) if not spec.residual
                  for place, layer in enumerate(spec.layer_ids)}
        self._layers = [
            _Layer(
                attention_norm=shard.norm("attention_norm", layer),
                attention=self._load_attention(shard, layer, *places[layer]),
                attention_post_norm=shard.optional_norm("attention_post_norm", layer),
                mlp_norm=shard.optional_norm("mlp_norm", layer),
                mlp=self._load_mlp(shard, layer),
                mlp_post_norm=shard.optional_norm("mlp_post_norm", layer),
            )
            for layer in range(config.num_layers)
        ]

    @classmethod
    @torch.inference_mode()
    def load(cls, config: ModelConfig, layout: TPLayout, source: WeightSource, dtype: torch.dtype,
             device: torch.device, comm: Communicator, max_model_len: int | None = None,
             kv_cache_dtype: str = "auto", quantization: str = "none") -> Decoder:
        """Read this rank's weights from `source`, as `dtype` on `device`, those of linear layers as `quantization`.

        `max_model_len` bounds the positions that a batch may name; default: what the model was made for.
        `kv_cache_dtype` and `quantization` as in `RankConfig`. Raises `ModelLoadError` when the files cannot be read.
        """
        max_model_len = max_model_len or config.max_position_embeddings
        shard = ShardReader(config, layout, source, dtype, device, quantization)
        return cls(config, layout, shard, device, comm, max_model_len, kv_cache_dtype)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, caches: list[torch.Tensor], observer: Observer | None = None,
                ) -> tuple[torch.Tensor, Best | None]:
        """Run the batch, writing its K and V into `caches` (one per KV group, `cache_shape`). Returns
        `[T, hidden_size]` in the model's dtype, the final norm applied, the same on every rank, and the best of the
        rows that the batch samples, None if it samples none. Inference tensors, which the next call may overwrite.
        `observer` looks at the attention of every layer.

        Raises `UnavailableError` when another rank is gone.
        """
        with forward_span():
            if self._recorded is not None and observer is None and caches is self._recorded_caches:
                hidden, best = self._recorded.run(batch)
            else:
                hidden, best = self._hidden(batch, caches, observer), None
            if not batch.sampled_rows.numel():
                return hidden, None
            return hidden, self._best(hidden, batch.sampled_rows) if best is None else best

    @torch.inference_mode()
    def record(self, caches: list[torch.Tensor], max_num_tokens: int, max_num_sampled: int) -> None:
        """Let `forward` be one native call for these very caches and up to so many tokens and sampled rows, where it is
        native ops only; otherwise it goes on op by op, and the log says why."""
        def forward(batch: ForwardBatch) -> tuple[torch.Tensor, Best | None]:
            hidden = self._hidden(batch, caches, None)
            # Softcaps are no native op: of those logits the best is found outside.
            return hidden, None if self.config.final_softcap is not None else self._best(hidden, batch.sampled_rows)

        try:
            self._recorded = RecordedForward(forward, len(self.kv_groups), max_num_tokens, max_num_sampled,
                                             has_residual=self.kv_groups[-1].residual)
        except NotRecordableError as error:
            logger.info("the forward pass runs op by op, not as one native call: %s", error)
            return
        self._recorded_caches = caches
        logger.info("the forward pass runs as one native call of %d ops", self._recorded.num_ops)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[R, hidden_size]`, of what `forward` returned -> `[R, local_vocab]`, of the token ids in `layout.vocab`:
        in the model's dtype, or float32 where they are capped. An inference tensor."""
        with Span("logits"):
            logits = linear(hidden, self._lm_head)
            cap = self.config.final_softcap
            return logits if cap is None else (logits.float() / cap).tanh() * cap

    def _best(self, hidden: torch.Tensor, rows: torch.Tensor) -> Best:
        return Best(*best_tokens(self.logits(take_rows(hidden, rows))))

    def _hidden(self, batch: ForwardBatch, caches: list[torch.Tensor], observer: Observer | None) -> torch.Tensor:
        # x: [num_tokens, hidden_size], the residual stream
        with Span("embedding"):
            angles = [(take_rows(cos, batch.positions), take_rows(sin, batch.positions)) for cos, sin in self._rotary]
            far = [None if rule is None else rule.angles(self._rotary[0], batch.positions)
                   for rule in self._far_sinks]
            x = self._embed(batch.token_ids, batch.positions)
        return self._run_layers(x, angles, far, batch, caches, observer)

    def _run_layers(self, x: torch.Tensor, angles: list[Angles], far: list[FarAngles | None], batch: ForwardBatch,
                    caches: list[torch.Tensor], observer: Observer | None) -> torch.Tensor:
        # What is to be added to x is added by the norm that comes next, on its one way through the row.
        addend: torch.Tensor | None = None
        for layer in self._layers:
            normed = layer.attention_norm(x, addend)
            part = layer.attention(normed, angles, far, batch, caches, observer)
            if self._parallel:
                mlp_part = layer.mlp(normed if layer.mlp_norm is None else layer.mlp_norm(x))
                addend = self._sum(part + mlp_part, layer.mlp_post_norm)
                continue
            addend = self._sum(part, layer.attention_post_norm)
            assert layer.mlp_norm is not None, "only a parallel MLP does without"
            addend = self._sum(layer.mlp(layer.mlp_norm(x, addend)), layer.mlp_post_norm)
        return self._final_norm(x, addend)

    def _embed(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # token_ids, positions: [num_tokens] -> [num_tokens, hidden_size]
        rows = self._comm.all_reduce(take_rows(self._embedding, token_ids, first=self.layout.vocab.start,
                                               partial=self.layout.tp_size > 1, scale=self._embedding_scale))
        return rows if self._positions is None else rows + take_rows(self._positions, positions)

    def _sum(self, part: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        """What a layer adds to the residual stream, from this rank's part of it."""
        whole = self._comm.all_reduce(part)
        return whole if norm is None else norm(whole)

    def _load_attention(self, shard: ShardReader, layer: int, group: int, layer_in_group: int) -> Attention:
        config, layout = self.config, self.layout
        angles = None
        if self._rotary:
            windowed = bool(config.layer_windows) and config.layer_windows[layer] is not None
            angles = 1 if windowed and len(self._rotary) > 1 else 0
        spec = self.kv_groups[group]
        return Attention(
            group, layer_in_group, layer if self.kv_groups[-1].residual else None, angles, layout.num_heads,
            layout.num_kv_heads, config.head_dim,
            scale=config.head_dim**-0.5 if config.attention_scale is None else config.attention_scale,
            mask=Mask(spec.window, spec.num_sinks, config.attention_softcap),
            qkv=shard.column_parallel(("q", "k", "v"), layer), q_norm=shard.optional_norm("q_norm", layer),
            k_norm=shard.optional_norm("k_norm", layer), o=shard.row_parallel("o", layer))

    def _load_mlp(self, shard: ShardReader, layer: int) -> Mlp | Experts:
        config, gated = self.config, shard.family.gated
        inner = ("gate", "up") if gated else ("up",)
        parts = [Mlp(shard.column_parallel(inner, layer, expert), shard.row_parallel("down", layer, expert),
                     config.activation, gated) for expert in range(max(1, config.num_experts))]
        if not config.num_experts:
            return parts[0]
        return Experts(shard.replicated("router", layer), parts, config.num_experts_per_token,
                       config.normalize_expert_weights)
