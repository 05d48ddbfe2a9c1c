"""Gemma 2: norms before and after attention and MLP, soft caps, a window in every other layer."""

from __future__ import annotations

from dataclasses import replace

from .family import ConfigKeys, Family, GGUFLayout, WindowRule
from .names import GGUF_NAMES, GGUF_POST_NORMS, HF_NAMES, HF_POST_NORMS

GEMMA2_KEYS = ConfigKeys(activation="hidden_activation", query_scalar="query_pre_attn_scalar")

GEMMA2 = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    hf_names=replace(HF_NAMES, **HF_POST_NORMS),
    gguf=GGUFLayout(
        architectures=("gemma2",), names=replace(GGUF_NAMES, **GGUF_POST_NORMS), num_width_scaled_layers=46),
    activations=("gelu_pytorch_tanh",),
    norm="rms_plus_one",
    config_keys=GEMMA2_KEYS,
    only={"use_bidirectional_attention": False, "mlp_bias": False},
    windows=WindowRule(required=True, full_every=2),
    tie_embeddings_default=True,
    head_dim_default=256,
    has_softcaps=True,
    attention_softcap_default=50.0,
    final_softcap_default=30.0,
    scales_embedding=True,
    attention_bias_on=("q", "k", "v", "o"),
)
