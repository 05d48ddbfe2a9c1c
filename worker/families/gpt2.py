"""GPT-2: learned positions, layer norms and biases everywhere, and weights stored in_features first."""

from __future__ import annotations

from dataclasses import replace

from .family import ConfigKeys, Family, GGUFLayout, TensorNames
from .names import GGUF_FUSED_QKV, GGUF_NAMES

GPT2_HF_NAMES = TensorNames(
    embedding="transformer.wte",
    positions="transformer.wpe",
    attention_norm="transformer.h.{i}.ln_1",
    q="transformer.h.{i}.attn.c_attn",
    k="transformer.h.{i}.attn.c_attn",
    v="transformer.h.{i}.attn.c_attn",
    o="transformer.h.{i}.attn.c_proj",
    mlp_norm="transformer.h.{i}.ln_2",
    gate=None,
    up="transformer.h.{i}.mlp.c_fc",
    down="transformer.h.{i}.mlp.c_proj",
    final_norm="transformer.ln_f",
    lm_head="lm_head",
)
GPT2_GGUF_NAMES = replace(GGUF_NAMES, **GGUF_FUSED_QKV, positions="position_embd", gate=None)
GPT2_KEYS = ConfigKeys(
    hidden_size="n_embd", intermediate_size="n_inner", num_layers="n_layer", num_heads="n_head",
    max_positions="n_positions", norm_eps="layer_norm_epsilon", activation="activation_function")

GPT2 = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel",),
    model_types=("gpt2",),
    hf_names=GPT2_HF_NAMES,
    hf_prefix="transformer.",
    gguf=GGUFLayout(architectures=("gpt2",), names=GPT2_GGUF_NAMES),
    activations=("gelu_new", "gelu_pytorch_tanh", "gelu", "relu"),
    norm="layer",
    transposed=("q", "k", "v", "o", "up", "down"),
    config_keys=GPT2_KEYS,
    only={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    tie_embeddings_default=True,
    mlp_ratio_default=4,
    always_biased=("q", "k", "v", "o", "up", "down"),
)
