"""The metadata of a GGUF file as a `ModelConfig`. The keys are the same for every architecture."""

from __future__ import annotations

import math

from gguf.constants import GGMLQuantizationType

from ...protos.errors import ModelLoadError
from ...protos.model import ModelConfig
from .family import Family, GGUFLayout
from .gguf_header import GGUFHeader, read_gguf_header
from .gguf_rope import read_rotary_dim, read_scaling
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

    def key(name: str) -> str:
        return f"{architecture}.{name}"

    num_experts = meta.integer(key("expert_count"), 0, minimum=0)
    family, layout = family_of_gguf(architecture, path, has_experts=num_experts > 0)
    names = layout.names
    hidden_size, num_heads = meta.integer(key("embedding_length")), meta.integer(key("attention.head_count"))
    num_layers = meta.integer(key("block_count"))
    head_dim = meta.integer(key("attention.key_length"), hidden_size // num_heads)
    rotary_dim = read_rotary_dim(meta, family, architecture, head_dim)
    mlp = key("expert_feed_forward_length")
    eos = [meta.integer(f"tokenizer.ggml.{name}_token_id", minimum=0) for name in _EOS_KEYS
           if f"tokenizer.ggml.{name}_token_id" in meta]
    bos = "tokenizer.ggml.bos_token_id"
    embedding = f"{names.embedding}.weight"
    local_theta = family.local_rope_theta_default
    return ModelConfig(
        path=path,
        format="gguf",
        family=family.name,
        hidden_size=hidden_size,
        intermediate_size=meta.integer(mlp if mlp in meta else key("feed_forward_length")),
        num_layers=num_layers,
        num_heads=num_heads,
        total_num_kv_heads=meta.integer(key("attention.head_count_kv"), num_heads),
        head_dim=head_dim,
        vocab_size=_tensor_shape(header, embedding)[0],
        max_position_embeddings=meta.integer(key("context_length")),
        norm_eps=meta.number(key("attention.layer_norm_epsilon" if family.norm == "layer" else
                                 "attention.layer_norm_rms_epsilon")),
        rope_theta=meta.number(key("rope.freq_base"), family.rope_theta_default),
        local_rope_theta=local_theta and meta.number(key("rope.freq_base_swa"), local_theta),
        rope_scaling=read_scaling(header, meta, architecture, rotary_dim or head_dim),
        rotary_dim=rotary_dim,
        learned_positions=family.hf_names.positions is not None,
        layer_windows=_windows(meta, family, key("attention.sliding_window"), num_layers),
        attention_scale=_attention_scale(family, layout, num_layers, head_dim, hidden_size // num_heads),
        attention_softcap=meta.optional_number(key("attn_logit_softcapping"), family.attention_softcap_default),
        final_softcap=meta.optional_number(key("final_logit_softcapping"), family.final_softcap_default),
        activation=family.activations[0],
        num_experts=num_experts,
        num_experts_per_token=meta.integer(key("expert_used_count")) if num_experts else 0,
        # As in llama.cpp, whose files do not say.
        normalize_expert_weights=num_experts > 0,
        tie_word_embeddings=f"{names.lm_head}.weight" not in header.tensors,
        attention_bias=_has_bias(header, family, layout, "q", family.attention_bias_on),
        mlp_bias=_has_bias(header, family, layout, "up", family.mlp_bias_on),
        torch_dtype=_DTYPES.get(header.tensors[f"{names.q.format(i=0)}.weight"].kind, "float32"),
        bos_token_id=meta.integer(bos, minimum=0) if bos in meta else None,
        eos_token_ids=tuple(dict.fromkeys(eos)),
    )


def _tensor_shape(header: GGUFHeader, name: str) -> tuple[int, ...]:
    if name not in header.tensors:
        raise ModelLoadError(f"{header.path}: tensor {name} is missing; fetch the file again")
    return header.tensors[name].shape


def _has_bias(header: GGUFHeader, family: Family, layout: GGUFLayout, part: str, known: tuple[str, ...]) -> bool:
    module = str(layout.names.of(part)).format(i=0)
    _tensor_shape(header, f"{module}.weight")
    if part in family.always_biased or f"{module}.bias" not in header.tensors:
        return False
    if part not in known:
        raise ModelLoadError(f"{header.path}: tensor {module}.bias is not supported for {family.name}")
    return True


def _windows(meta: Metadata, family: Family, key: str, num_layers: int) -> tuple[int | None, ...]:
    rule = family.windows
    if rule is None or (key not in meta and not rule.required):
        return ()
    return rule.windows(meta.integer(key), num_layers, rule.first_layer_default if rule.first_layer else 0,
                        rule.full_every)


def _attention_scale(family: Family, layout: GGUFLayout, num_layers: int, head_dim: int, head_width: int
                     ) -> float | None:
    if family.config_keys.query_scalar is None:
        return None
    return 1.0 / math.sqrt(head_width if num_layers == layout.num_width_scaled_layers else head_dim)
