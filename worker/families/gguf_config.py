"""The metadata of a GGUF file as a `ModelConfig`. The keys are the same for every architecture."""

from __future__ import annotations

import math
import os
import struct

from gguf.constants import GGMLQuantizationType

from ...protos.errors import ModelLoadError
from ...protos.model import ModelConfig, RopeScaling
from .family import Family
from .gguf_header import GGUFHeader, read_gguf_header
from .metadata import Metadata
from .table import family_of_gguf

_DTYPES = {GGMLQuantizationType.F16: "float16", GGMLQuantizationType.BF16: "bfloat16"}
_EOS_KEYS = ("eos", "eot", "eom")


def read_gguf_config(path: str) -> ModelConfig:
    """The configuration of the model in the GGUF file at `path`. Raises `ModelLoadError`."""
    header = read_gguf_header(path)
    meta = Metadata(path, header.values)
    if meta.integer("split.count", 1) > 1:
        raise ModelLoadError(f"{path}: part of a split GGUF model; join the parts with `llama-gguf-split --merge`")
    architecture = meta.text("general.architecture")
    family = family_of_gguf(architecture, path)
    names = family.gguf_names

    def key(name: str) -> str:
        return f"{architecture}.{name}"

    hidden_size, num_heads = meta.integer(key("embedding_length")), meta.integer(key("attention.head_count"))
    head_dim = meta.integer(key("attention.key_length"), hidden_size // num_heads)
    if (rotary := meta.integer(key("rope.dimension_count"), head_dim)) != head_dim:
        raise ModelLoadError(f"{path}: rotary positions on {rotary} of {head_dim} dimensions are not supported")
    eos = [meta.integer(f"tokenizer.ggml.{name}_token_id", minimum=0) for name in _EOS_KEYS
           if f"tokenizer.ggml.{name}_token_id" in meta]
    bos = "tokenizer.ggml.bos_token_id"
    embedding = f"{names.embedding}.weight"
    return ModelConfig(
        path=path,
        format="gguf",
        family=family.name,
        hidden_size=hidden_size,
        intermediate_size=meta.integer(key("feed_forward_length")),
        num_layers=meta.integer(key("block_count")),
        num_heads=num_heads,
        total_num_kv_heads=meta.integer(key("attention.head_count_kv"), num_heads),
        head_dim=head_dim,
        vocab_size=_tensor_shape(header, embedding)[0],
        max_position_embeddings=meta.integer(key("context_length")),
        norm_eps=meta.number(key("attention.layer_norm_rms_epsilon")),
        rope_theta=meta.number(key("rope.freq_base"), 10000.0),
        rope_scaling=_rope_scaling(header, meta, architecture, head_dim),
        tie_word_embeddings=f"{names.lm_head}.weight" not in header.tensors,
        attention_bias=_has_bias(header, family, "q"),
        mlp_bias=_has_bias(header, family, "up"),
        torch_dtype=_DTYPES.get(header.tensors[f"{names.q.format(i=0)}.weight"].kind, "float32"),
        bos_token_id=meta.integer(bos, minimum=0) if bos in meta else None,
        eos_token_ids=tuple(dict.fromkeys(eos)),
    )


def _tensor_shape(header: GGUFHeader, name: str) -> tuple[int, ...]:
    if name not in header.tensors:
        raise ModelLoadError(f"{header.path}: tensor {name} is missing; fetch the file again")
    return header.tensors[name].shape


def _has_bias(header: GGUFHeader, family: Family, part: str) -> bool:
    module: str = getattr(family.gguf_names, part)
    _tensor_shape(header, f"{module.format(i=0)}.weight")
    return f"{module.format(i=0)}.bias" in header.tensors


def _rope_scaling(header: GGUFHeader, meta: Metadata, architecture: str, head_dim: int) -> RopeScaling | None:
    factors = header.tensors.get("rope_freqs.weight")
    if factors is not None:
        if factors.shape != (head_dim // 2,) or factors.kind != GGMLQuantizationType.F32:
            raise ModelLoadError(f"{header.path}: tensor rope_freqs.weight must be float32 [{head_dim // 2}]")
        with open(header.path, "rb") as file:
            data = os.pread(file.fileno(), factors.num_bytes, factors.offset)
        divisors = struct.unpack(f"<{head_dim // 2}f", data)
        if not all(math.isfinite(divisor) and divisor > 0 for divisor in divisors):
            raise ModelLoadError(f"{header.path}: tensor rope_freqs.weight holds a divisor that is not a positive, "
                                 "finite number; fetch the file again")
        return RopeScaling(kind="factors", frequency_factors=divisors)
    kind = meta.text(f"{architecture}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=meta.number(f"{architecture}.rope.scaling.factor"))
    raise ModelLoadError(f"{header.path}: rope scaling '{kind}' is not supported; supported: none, linear")
