"""`config.json` and `generation_config.json` of a directory in Hugging Face format."""

from __future__ import annotations

import json
import os

from ...protos.errors import ModelLoadError
from ...protos.model import ModelConfig, RopeScaling
from .family import Family
from .metadata import Metadata
from .table import family_of_hf

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
    family = family_of_hf(_architecture(meta), meta.text("model_type", ""), path)
    keys = family.config_keys
    if (activation := meta.text(keys.activation, family.activation)) != family.activation:
        raise ModelLoadError(f"{path}: {keys.activation} '{activation}' is not supported for {family.name}; "
                             f"supported: {family.activation}")
    generation_path = os.path.join(directory, "generation_config.json")
    generation = _read_json(generation_path) if os.path.isfile(generation_path) else Metadata(generation_path, {})
    hidden_size, num_heads = meta.integer(keys.hidden_size), meta.integer(keys.num_heads)
    bos = generation.token_ids("bos_token_id") or meta.token_ids("bos_token_id")
    rope_theta, rope_scaling = _rope(meta)
    return ModelConfig(
        path=directory,
        format="hf",
        family=family.name,
        hidden_size=hidden_size,
        intermediate_size=meta.integer(keys.intermediate_size),
        num_layers=meta.integer(keys.num_layers),
        num_heads=num_heads,
        total_num_kv_heads=meta.integer(keys.num_kv_heads, num_heads),
        head_dim=_head_dim(meta, family, hidden_size, num_heads),
        vocab_size=meta.integer(keys.vocab_size),
        max_position_embeddings=meta.integer(keys.max_positions),
        norm_eps=meta.number(keys.norm_eps),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tie_word_embeddings=meta.boolean(keys.tie_embeddings, family.tie_embeddings_default),
        attention_bias=meta.boolean(keys.attention_bias, False),
        mlp_bias=meta.boolean(keys.mlp_bias, False),
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
    if key not in meta and hidden_size % num_heads:
        raise ModelLoadError(f"{meta.path}: '{key}' is missing and hidden_size {hidden_size} does not divide by "
                             f"{num_heads} heads")
    return meta.integer(key, hidden_size // num_heads)


def _dtype(meta: Metadata) -> str:
    name = meta.text("dtype" if "dtype" in meta else "torch_dtype", "float32")
    if name not in _DTYPES:
        raise ModelLoadError(f"{meta.path}: dtype '{name}' is not supported; supported: {', '.join(_DTYPES)}")
    return name


def _rope(meta: Metadata) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (Transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    if "rope_parameters" in meta:
        scaling = meta.section("rope_parameters")
        theta = scaling.number("rope_theta", meta.number("rope_theta", 10000.0))
    else:
        scaling = meta.section("rope_scaling")
        theta = meta.number("rope_theta", 10000.0)
    kind = scaling.text("rope_type" if "rope_type" in scaling else "type", "default")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling(kind="linear", factor=scaling.number("factor"))
    if kind == "llama3":
        return theta, RopeScaling(
            kind="llama3", factor=scaling.number("factor"),
            low_freq_factor=scaling.number("low_freq_factor"), high_freq_factor=scaling.number("high_freq_factor"),
            original_max_position_embeddings=scaling.integer("original_max_position_embeddings"))
    raise ModelLoadError(f"{meta.path}: rope scaling '{kind}' is not supported; supported: default, linear, llama3")
