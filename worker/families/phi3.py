"""Phi 3, 3.5 and 4 (mini and 14B): a llama whose q, k, v are one tensor, and gate and up another; part of each head
may not turn."""

from __future__ import annotations

from dataclasses import replace

from .family import Family, GGUFLayout, WindowRule
from .names import GGUF_FUSED_QKV, GGUF_NAMES, HF_NAMES

PHI3 = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM",),
    model_types=("phi3",),
    hf_names=replace(
        HF_NAMES,
        **dict.fromkeys(("q", "k", "v"), "model.layers.{i}.self_attn.qkv_proj"),
        **dict.fromkeys(("gate", "up"), "model.layers.{i}.mlp.gate_up_proj"),
    ),
    gguf=GGUFLayout(architectures=("phi3",), names=replace(GGUF_NAMES, **GGUF_FUSED_QKV, gate="blk.{i}.ffn_up")),
    windows=WindowRule(),
    only={"attention_bias": False, "mlp_bias": False, "layer_types": None},
    partial_rotary=True,
)
