"""Llama 1 to 3 and what shares their architecture (SmolLM2, TinyLlama, ...)."""

from __future__ import annotations

from .family import Family, GGUFLayout
from .names import GGUF_NAMES, HF_NAMES

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    hf_names=HF_NAMES,
    gguf=GGUFLayout(architectures=("llama",), names=GGUF_NAMES, interleaves_rope=True),
    attention_bias_on=("q", "k", "v", "o"),
    mlp_bias_on=("gate", "up", "down"),
)
