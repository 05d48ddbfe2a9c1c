"""What a model's own files say about it, read once at the edge and handed to every process that needs it."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class RopeScaling(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Rotary scaling as `config.json` states it; the fields used depend on `kind`."""

    kind: Literal["linear", "llama3", "factors"]
    """`factors`: every frequency has its own divisor, as GGUF files state what `config.json` calls llama3."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0
    frequency_factors: tuple[float, ...] = ()
    """Of kind `factors`: `head_dim / 2` divisors."""


class ModelConfig(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Everything that the decoder, the scheduler and the frontends need to know of a model. Sizes are of the whole
    model, before any tensor-parallel split."""

    path: str
    """Absolute: a directory in Hugging Face format or a `.gguf` file."""
    format: Literal["hf", "gguf"]
    family: str
    """Key of the family table in `worker/families`."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    total_num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    torch_dtype: str = "float32"
    """The dtype that the files were saved in; what `dtype="auto"` means."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Generation ends at any of these, unless `ignore_eos`."""


class KVGroupSpec(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The layers that share one cache policy (DESIGN: KV group). `window` None: every token stays visible."""

    layer_ids: tuple[int, ...]
    window: int | None = None
    num_sinks: int = 0
