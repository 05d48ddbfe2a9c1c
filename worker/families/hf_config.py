"""`config.json` and `generation_config.json` of a directory in Hugging Face format."""

from __future__ import annotations

import json
import os

from ...protos.errors import ModelLoadError
from ...protos.model import ModelConfig
from .family import Family
from .hf_rope import read_rope
from .metadata import Metadata
from .table import family_of_hf
from .windows import read_windows

_DTYPES = ("float32", "bfloat16", "float16")


def read_hf_config(directory: str) -> ModelConfig:
    """The configuration of the model in `directory`. Raises `ModelLoadError`."""
    path = os.path.join(directory, "config.json")
    if not os.path.isfile(path):
        raise ModelLoadError(_no_config(directory))
    meta = _read_json(path)
    if "quantization_config" in meta:
        raise ModelLoadError(f"{path}: pre-quantized checkpoints are not supported (quantization_config); "
                             "use the original weights or a .gguf file")
    family = family_of_hf(_architecture(meta), meta)
    for key, value in family.only.items():
        meta.require(key, value, f"for {family.name}")
    keys = family.config_keys
    generation_path = os.path.join(directory, "generation_config.json")
    generation = _read_json(generation_path) if os.path.isfile(generation_path) else Metadata(generation_path, {})
    hidden_size, num_heads = meta.integer(keys.hidden_size), meta.integer(keys.num_heads)
    num_layers = meta.integer(keys.num_layers)
    head_dim = _head_dim(meta, family, hidden_size, num_heads)
    ratio = family.mlp_ratio_default
    rope = read_rope(meta, family, head_dim, meta.integer(keys.max_positions))
    bos = generation.token_ids("bos_token_id") or meta.token_ids("bos_token_id")
    return ModelConfig(
        path=directory,
        format="hf",
        family=family.name,
        hidden_size=hidden_size,
        intermediate_size=meta.integer(keys.intermediate_size, ratio and ratio * hidden_size),
        num_layers=num_layers,
        num_heads=num_heads,
        total_num_kv_heads=_num_kv_heads(meta, family, num_heads),
        head_dim=head_dim,
        vocab_size=meta.integer(keys.vocab_size),
        max_position_embeddings=rope.max_positions,
        norm_eps=meta.number(keys.norm_eps),
        rope_theta=rope.theta,
        local_rope_theta=rope.local_theta,
        rope_scaling=rope.scaling,
        rotary_dim=rope.rotary_dim,
        learned_positions=family.hf_names.positions is not None,
        layer_windows=read_windows(meta, family.windows, num_layers),
        attention_scale=None if keys.query_scalar is None else meta.number(keys.query_scalar)**-0.5,
        attention_softcap=_softcap(meta, family, "attn_logit_softcapping", family.attention_softcap_default),
        final_softcap=_softcap(meta, family, "final_logit_softcapping", family.final_softcap_default),
        activation=_activation(meta, family),
        num_experts=_num_experts(meta, family),
        num_experts_per_token=meta.integer(keys.num_experts_per_token) if family.has_experts else 0,
        normalize_expert_weights=family.has_experts and _normalizes_experts(meta, family),
        tie_word_embeddings=meta.boolean(keys.tie_embeddings, family.tie_embeddings_default),
        attention_bias=bool(family.attention_bias_on) and meta.boolean(keys.attention_bias, False),
        mlp_bias=bool(family.mlp_bias_on) and meta.boolean(keys.mlp_bias, False),
        torch_dtype=_dtype(meta),
        bos_token_id=bos[0] if bos else None,
        # As in Transformers: what generation_config.json says replaces what config.json says.
        eos_token_ids=generation.token_ids("eos_token_id") or meta.token_ids("eos_token_id"),
    )


def _read_json(path: str) -> Metadata:
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ModelLoadError(f"{path}: not valid JSON ({error}); the file is damaged, fetch it again") from None
    if not isinstance(values, dict):
        raise ModelLoadError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    return Metadata(path, values)


def _no_config(directory: str) -> str:
    ggufs = sorted(name for name in os.listdir(directory) if name.endswith(".gguf"))
    if ggufs:
        return f"{directory}: no config.json; to load a GGUF file name it: {os.path.join(directory, ggufs[0])}"
    return f"{directory}: no config.json; give the directory that holds the model's config.json and *.safetensors"


def _architecture(meta: Metadata) -> str | None:
    names = meta.strings("architectures")
    return names[0] if names else None


def _head_dim(meta: Metadata, family: Family, hidden_size: int, num_heads: int) -> int:
    key = family.config_keys.head_dim
    if key not in meta and family.head_dim_default is None and hidden_size % num_heads:
        raise ModelLoadError(f"{meta.path}: '{key}' is missing and hidden_size {hidden_size} does not divide by "
                             f"{num_heads} heads")
    return meta.integer(key, family.head_dim_default or hidden_size // num_heads)


def _num_kv_heads(meta: Metadata, family: Family, num_heads: int) -> int:
    keys = family.config_keys
    if keys.multi_query is None:
        return meta.integer(keys.num_kv_heads, num_heads)
    return 1 if meta.boolean(keys.multi_query, True) else num_heads


def _softcap(meta: Metadata, family: Family, key: str, default: float | None) -> float | None:
    return meta.optional_number(key, default) if family.has_softcaps else None


def _activation(meta: Metadata, family: Family) -> str:
    key = family.config_keys.activation
    activation = meta.text(key, family.activations[0])
    if activation not in family.activations:
        raise ModelLoadError(f"{meta.path}: {key} '{activation}' is not supported for {family.name}; supported: "
                             f"{', '.join(family.activations)}")
    return activation


def _num_experts(meta: Metadata, family: Family) -> int:
    if not family.has_experts:
        return 0
    keys = family.config_keys.num_experts
    return meta.integer(next((key for key in keys if key in meta), keys[0]))


def _normalizes_experts(meta: Metadata, family: Family) -> bool:
    return meta.boolean("norm_topk_prob", False) if family.normalizes_experts is None else family.normalizes_experts


def _dtype(meta: Metadata) -> str:
    name = meta.text("dtype" if "dtype" in meta else "torch_dtype", "float32")
    if name not in _DTYPES:
        raise ModelLoadError(f"{meta.path}: dtype '{name}' is not supported; supported: {', '.join(_DTYPES)}")
    return name
