"""What sets one model family apart from another, as data: the decoder and the weight readers are the same for all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from ...protos.model import ModelConfig

AttentionPart = Literal["q", "k", "v", "o"]
MlpPart = Literal["gate", "up", "down"]


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Module names in one file format; `{i}` is the layer, and a tensor is `<module>.weight` or `<module>.bias`."""

    embedding: str
    attention_norm: str
    q: str
    k: str
    v: str
    o: str
    mlp_norm: str
    gate: str
    up: str
    down: str
    final_norm: str
    lm_head: str


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """Keys of `config.json`; the defaults are what most families use."""

    hidden_size: str = "hidden_size"
    intermediate_size: str = "intermediate_size"
    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    num_kv_heads: str = "num_key_value_heads"
    head_dim: str = "head_dim"
    vocab_size: str = "vocab_size"
    max_positions: str = "max_position_embeddings"
    norm_eps: str = "rms_norm_eps"
    activation: str = "hidden_act"
    attention_bias: str = "attention_bias"
    mlp_bias: str = "mlp_bias"
    tie_embeddings: str = "tie_word_embeddings"


@dataclass(frozen=True, slots=True)
class Family:
    """One family of decoders: pre-norm attention and a gated MLP, each added to the residual stream."""

    name: str
    architectures: tuple[str, ...]
    """Values of `architectures` in `config.json`."""
    model_types: tuple[str, ...]
    """Values of `model_type` in `config.json`, looked at when it names no architecture."""
    gguf_architectures: tuple[str, ...]
    """Values of `general.architecture` in a GGUF file."""
    hf_names: TensorNames
    gguf_names: TensorNames
    activation: Literal["silu"]
    """Of the gate, by the name that Transformers gives it."""
    config_keys: ConfigKeys = ConfigKeys()
    tie_embeddings_default: bool = False
    """What it means when `config.json` does not say."""
    attention_bias_on: tuple[AttentionPart, ...] = ("q", "k", "v", "o")
    """Which projections have a bias when `attention_bias` is set."""
    mlp_bias_on: tuple[MlpPart, ...] = ("gate", "up", "down")
    gguf_interleaves_rope: bool = False
    """GGUF files of this family hold the q and k rows of a head in pairs (j, j + head_dim / 2)."""

    def biased(self, config: ModelConfig) -> tuple[str, ...]:
        """The parts, by their names in `TensorNames`, that have a bias."""
        return (self.attention_bias_on if config.attention_bias else ()) + (self.mlp_bias_on if config.mlp_bias else ())


def expected_shapes(family: Family, config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that the files of this model must hold, by its Hugging Face name, with its whole shape.

    An iterator, so that a damaged number of layers ends at the first tensor that is not there.
    """
    hidden, vocab = config.hidden_size, config.vocab_size
    q_rows, kv_rows = config.num_heads * config.head_dim, config.total_num_kv_heads * config.head_dim
    mlp = config.intermediate_size
    weight_shapes: dict[str, tuple[int, ...]] = {
        "embedding": (vocab, hidden), "lm_head": (vocab, hidden),
        "attention_norm": (hidden,), "mlp_norm": (hidden,), "final_norm": (hidden,),
        "q": (q_rows, hidden), "k": (kv_rows, hidden), "v": (kv_rows, hidden), "o": (hidden, q_rows),
        "gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp),
    }
    biased = family.biased(config)
    for part in (field.name for field in fields(TensorNames)):
        if part == "lm_head" and config.tie_word_embeddings:
            continue
        pattern: str = getattr(family.hf_names, part)
        for layer in range(config.num_layers if "{i}" in pattern else 1):
            module = pattern.format(i=layer)
            yield f"{module}.weight", weight_shapes[part]
            if part in biased:
                yield f"{module}.bias", weight_shapes[part][:1]
