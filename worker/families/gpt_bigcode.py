"""StarCoder and SantaCoder: GPT-2 with one KV head for all query heads, and weights stored the usual way round."""

from __future__ import annotations

from dataclasses import replace

from .family import Family, GGUFLayout
from .gpt2 import GPT2_GGUF_NAMES, GPT2_HF_NAMES, GPT2_KEYS

GPT_BIGCODE = Family(
    name="gpt_bigcode",
    architectures=("GPTBigCodeForCausalLM",),
    model_types=("gpt_bigcode",),
    hf_names=GPT2_HF_NAMES,
    hf_prefix="transformer.",
    gguf=GGUFLayout(architectures=("starcoder",), names=GPT2_GGUF_NAMES),
    activations=("gelu_pytorch_tanh", "gelu_new", "gelu", "relu"),
    norm="layer",
    qkv_order="kv_heads",
    config_keys=replace(GPT2_KEYS, multi_query="multi_query"),
    only={"scale_attn_weights": True, "add_cross_attention": False},
    tie_embeddings_default=True,
    mlp_ratio_default=4,
    always_biased=("q", "k", "v", "o", "up", "down"),
)
