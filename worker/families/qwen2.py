"""Qwen 2 and 2.5: a llama with biases on q, k and v."""

from __future__ import annotations

from .family import Family, GGUFLayout, WindowRule
from .names import GGUF_NAMES, HF_NAMES

QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    hf_names=HF_NAMES,
    gguf=GGUFLayout(architectures=("qwen2",), names=GGUF_NAMES),
    windows=WindowRule(
        default=4096, switch="use_sliding_window", first_layer="max_window_layers", first_layer_default=28),
    only={"attention_bias": None, "mlp_bias": False},
    always_biased=("q", "k", "v"),
)
