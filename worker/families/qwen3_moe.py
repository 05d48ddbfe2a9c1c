"""Qwen 3 with experts in every layer."""

from __future__ import annotations

from dataclasses import replace

from .family import ConfigKeys, Family, GGUFLayout, WindowRule
from .names import GGUF_EXPERTS, GGUF_NAMES, GGUF_QK_NORMS, HF_NAMES, HF_QK_NORMS

QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    hf_names=replace(
        HF_NAMES,
        **HF_QK_NORMS,
        router="model.layers.{i}.mlp.gate",
        gate="model.layers.{i}.mlp.experts.{e}.gate_proj",
        up="model.layers.{i}.mlp.experts.{e}.up_proj",
        down="model.layers.{i}.mlp.experts.{e}.down_proj",
    ),
    gguf=GGUFLayout(architectures=("qwen3moe",), names=replace(GGUF_NAMES, **GGUF_QK_NORMS, **GGUF_EXPERTS)),
    config_keys=ConfigKeys(intermediate_size="moe_intermediate_size"),
    windows=WindowRule(default=4096, switch="use_sliding_window"),
    only={"mlp_only_layers": [], "decoder_sparse_step": 1, "mlp_bias": False, "layer_types": None},
    attention_bias_on=("q", "k", "v", "o"),
)
