"""Qwen 3, dense: a llama with norms on the heads of q and k."""

from __future__ import annotations

from dataclasses import replace

from .family import Family, GGUFLayout, WindowRule
from .names import GGUF_NAMES, GGUF_QK_NORMS, HF_NAMES, HF_QK_NORMS

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    hf_names=replace(HF_NAMES, **HF_QK_NORMS),
    gguf=GGUFLayout(architectures=("qwen3",), names=replace(GGUF_NAMES, **GGUF_QK_NORMS)),
    windows=WindowRule(
        default=4096, switch="use_sliding_window", first_layer="max_window_layers", first_layer_default=28),
    only={"mlp_bias": False},
    head_dim_default=128,
    attention_bias_on=("q", "k", "v", "o"),
)
