"""Falcon: attention and MLP side by side, q, k and v one tensor. The 7B has one KV head and one norm; 40B and 180B, the
"new decoder architecture", have several KV heads and a norm each for attention and MLP."""

from __future__ import annotations

from dataclasses import replace

from .family import ConfigKeys, Family, TensorNames

_NAMES = TensorNames(
    embedding="transformer.word_embeddings",
    attention_norm="transformer.h.{i}.input_layernorm",
    q="transformer.h.{i}.self_attention.query_key_value",
    k="transformer.h.{i}.self_attention.query_key_value",
    v="transformer.h.{i}.self_attention.query_key_value",
    o="transformer.h.{i}.self_attention.dense",
    mlp_norm=None,
    gate=None,
    up="transformer.h.{i}.mlp.dense_h_to_4h",
    down="transformer.h.{i}.mlp.dense_4h_to_h",
    final_norm="transformer.ln_f",
    lm_head="lm_head",
)
_KEYS = ConfigKeys(
    intermediate_size="ffn_hidden_size", num_kv_heads="num_kv_heads", norm_eps="layer_norm_epsilon",
    activation="activation", attention_bias="bias", mlp_bias="bias")

FALCON = Family(
    name="falcon",
    architectures=("FalconForCausalLM",),
    model_types=("falcon",),
    hf_names=_NAMES,
    hf_prefix="transformer.",
    activations=("gelu",),
    norm="layer",
    qkv_order="kv_heads",
    config_keys=replace(_KEYS, multi_query="multi_query"),
    parallel=True,
    when={"new_decoder_architecture": False},
    only={"alibi": False, "parallel_attn": True},
    tie_embeddings_default=True,
    mlp_ratio_default=4,
    attention_bias_on=("q", "k", "v", "o"),
    mlp_bias_on=("up", "down"),
)
FALCON_40B = replace(
    FALCON,
    name="falcon_40b",
    hf_names=replace(_NAMES, attention_norm="transformer.h.{i}.ln_attn", mlp_norm="transformer.h.{i}.ln_mlp"),
    config_keys=_KEYS,
    when={"new_decoder_architecture": True},
    only={"alibi": False, "parallel_attn": True, "num_ln_in_parallel_attn": 2},
)
