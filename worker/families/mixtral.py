"""Mixtral: Mistral with experts. In GGUF files it calls itself llama."""

from __future__ import annotations

from dataclasses import replace

from .family import Family, GGUFLayout, WindowRule
from .names import GGUF_EXPERTS, GGUF_NAMES, HF_NAMES

MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    model_types=("mixtral",),
    hf_names=replace(
        HF_NAMES,
        router="model.layers.{i}.block_sparse_moe.gate",
        gate="model.layers.{i}.block_sparse_moe.experts.{e}.w1",
        up="model.layers.{i}.block_sparse_moe.experts.{e}.w3",
        down="model.layers.{i}.block_sparse_moe.experts.{e}.w2",
    ),
    gguf=GGUFLayout(architectures=("llama",), names=replace(GGUF_NAMES, **GGUF_EXPERTS), interleaves_rope=True),
    windows=WindowRule(),
    only={"attention_bias": False, "mlp_bias": False, "layer_types": None},
    rope_theta_default=1000000.0,
    normalizes_experts=True,
)
