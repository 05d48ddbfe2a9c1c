"""The tensor names that most families share, in each file format; a family states what it has otherwise."""

from __future__ import annotations

from .family import TensorNames

HF_NAMES = TensorNames(
    embedding="model.embed_tokens",
    attention_norm="model.layers.{i}.input_layernorm",
    q="model.layers.{i}.self_attn.q_proj",
    k="model.layers.{i}.self_attn.k_proj",
    v="model.layers.{i}.self_attn.v_proj",
    o="model.layers.{i}.self_attn.o_proj",
    mlp_norm="model.layers.{i}.post_attention_layernorm",
    gate="model.layers.{i}.mlp.gate_proj",
    up="model.layers.{i}.mlp.up_proj",
    down="model.layers.{i}.mlp.down_proj",
    final_norm="model.norm",
    lm_head="lm_head",
)
HF_QK_NORMS = {"q_norm": "model.layers.{i}.self_attn.q_norm", "k_norm": "model.layers.{i}.self_attn.k_norm"}
HF_POST_NORMS = {
    "attention_post_norm": "model.layers.{i}.post_attention_layernorm",
    "mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
    "mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
}

GGUF_NAMES = TensorNames(
    embedding="token_embd",
    attention_norm="blk.{i}.attn_norm",
    q="blk.{i}.attn_q",
    k="blk.{i}.attn_k",
    v="blk.{i}.attn_v",
    o="blk.{i}.attn_output",
    mlp_norm="blk.{i}.ffn_norm",
    gate="blk.{i}.ffn_gate",
    up="blk.{i}.ffn_up",
    down="blk.{i}.ffn_down",
    final_norm="output_norm",
    lm_head="output",
)
GGUF_FUSED_QKV = dict.fromkeys(("q", "k", "v"), "blk.{i}.attn_qkv")
GGUF_QK_NORMS = {"q_norm": "blk.{i}.attn_q_norm", "k_norm": "blk.{i}.attn_k_norm"}
GGUF_POST_NORMS = {"attention_post_norm": "blk.{i}.post_attention_norm", "mlp_post_norm": "blk.{i}.post_ffw_norm"}
GGUF_EXPERTS = {
    "router": "blk.{i}.ffn_gate_inp",
    "gate": "blk.{i}.ffn_gate_exps",
    "up": "blk.{i}.ffn_up_exps",
    "down": "blk.{i}.ffn_down_exps",
}
"""One tensor holds a part of all experts of a layer."""
