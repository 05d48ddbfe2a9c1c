"""Llama 1 to 3 and what shares their architecture (SmolLM2, TinyLlama, ...)."""

from __future__ import annotations

from .family import Family, TensorNames

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    gguf_architectures=("llama",),
    activation="silu",
    gguf_interleaves_rope=True,
    hf_names=TensorNames(
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
    ),
    gguf_names=TensorNames(
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
    ),
)
