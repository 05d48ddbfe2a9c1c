"""Gemma 3, the models of text alone: Gemma 2 with norms on the heads of q and k in the place of soft caps, and another
rotary base in the layers with a window, which are five of six."""

from __future__ import annotations

from dataclasses import replace

from .family import Family, GGUFLayout, WindowRule
from .gemma2 import GEMMA2_KEYS
from .names import GGUF_NAMES, GGUF_POST_NORMS, GGUF_QK_NORMS, HF_NAMES, HF_POST_NORMS, HF_QK_NORMS

GEMMA3 = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM",),
    model_types=("gemma3_text",),
    hf_names=replace(HF_NAMES, **HF_POST_NORMS, **HF_QK_NORMS),
    gguf=GGUFLayout(
        architectures=("gemma3",), names=replace(GGUF_NAMES, **GGUF_POST_NORMS, **GGUF_QK_NORMS),
        num_width_scaled_layers=62),
    activations=("gelu_pytorch_tanh",),
    norm="rms_plus_one",
    config_keys=GEMMA2_KEYS,
    only={"use_bidirectional_attention": False, "mlp_bias": False},
    windows=WindowRule(required=True, full_every=6),
    tie_embeddings_default=True,
    head_dim_default=256,
    rope_theta_default=1000000.0,
    local_rope_theta_default=10000.0,
    has_softcaps=True,
    scales_embedding=True,
    attention_bias_on=("q", "k", "v", "o"),
)
