"""SmolLM2-135M-Instruct as a bfloat16 folder in Hugging Face format, so that all peers run the same weights. Made
once, of the GGUF file (Q4_1, dequantized) that kvarto's alias smollm2-135m fetches.

Usage: python tests/benchmarks/peers/prepare_model.py [FOLDER]        default: ~/.cache/kvarto/models/smollm2-135m-bf16
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from transformers import AutoTokenizer

from kvarto.cluster.model_hub import cache_folder, resolve_model

NUM_HEADS, NUM_KV_HEADS = 9, 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": NUM_HEADS, "num_key_value_heads": NUM_KV_HEADS,
    "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000,
    "hidden_act": "silu", "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    "dtype": "bfloat16", "attention_bias": False, "mlp_bias": False}
OF_LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
OF_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def prepared(folder: Path | None = None) -> Path:
    """The folder, made unless it is there. A run that is cut off leaves none."""
    target = folder or cache_folder() / "models" / "smollm2-135m-bf16"
    if not target.exists():
        unfinished = target.with_name(f"{target.name}.{os.getpid()}")
        unfinished.mkdir(parents=True)
        _write(Path(resolve_model("smollm2-135m")), unfinished)
        unfinished.rename(target)
    return target


def _write(gguf: Path, target: Path) -> None:
    state = dict(_converted(tensor) for tensor in GGUFReader(gguf).tensors)
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    (target / "config.json").write_text(json.dumps(CONFIG, indent=1))


def _converted(tensor) -> tuple[str, torch.Tensor]:
    weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
    kind, _, rest = tensor.name.removesuffix(".weight").partition(".")
    if kind != "blk":
        return f"{OF_MODEL[kind]}.weight", weight.to(torch.bfloat16)
    layer, _, kind = rest.partition(".")
    if kind in ("attn_q", "attn_k"):
        weight = _halves_apart(weight, NUM_HEADS if kind == "attn_q" else NUM_KV_HEADS)
    return f"model.layers.{layer}.{OF_LAYER[kind]}.weight", weight.to(torch.bfloat16).contiguous()


def _halves_apart(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """GGUF interleaves the rotary halves of q and k; Hugging Face keeps them apart."""
    return weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


if __name__ == "__main__":
    print(prepared(Path(sys.argv[1]) if sys.argv[1:] else None))
