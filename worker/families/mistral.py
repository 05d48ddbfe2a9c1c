"""Mistral 7B and its kin: a llama whose layers may all have a window. In GGUF files it calls itself llama."""

from __future__ import annotations

from .family import Family, WindowRule
from .names import HF_NAMES

MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    hf_names=HF_NAMES,
    windows=WindowRule(default=4096),
    only={"attention_bias": False, "mlp_bias": False, "layer_types": None},
)
