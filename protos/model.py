"""What a model's own files say about it, read once at the edge and handed to every process that needs it."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class RopeScaling(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Rotary scaling as `config.json` states it; the fields used depend on `kind`."""

    kind: Literal["linear", "llama3", "factors", "yarn", "dynamic", "longrope"]
    """`factors`: every frequency has its own divisor, as GGUF files state what `config.json` calls llama3.
    `dynamic` and `longrope` are fixed by `max_model_len` when a model is loaded: frequencies that followed the length
    of a sequence would make the keys in its cache wrong."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0
    frequency_factors: tuple[float, ...] = ()
    """Of kinds `factors` and `longrope` (up to the original length): half as many divisors as dimensions that turn."""
    long_frequency_factors: tuple[float, ...] = ()
    """Of kind `longrope`: the divisors beyond the original length."""
    attention_factor: float = 1.0
    """Of kinds `yarn` and `longrope`: cosines and sines are multiplied by it."""
    beta_fast: float = 32.0
    """Of kind `yarn`: frequencies that turn at least so often within the original length stay, and those that turn at
    most `beta_slow` times are divided by `factor`."""
    beta_slow: float = 1.0
    truncate: bool = True
    """Of kind `yarn`: whether the borders between them are rounded to whole dimensions."""


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
    rope_theta: float = 10000.0
    """Base of the rotary frequencies; unused where the family learns its positions."""
    local_rope_theta: float | None = None
    """Base in layers with a window, which then have no `rope_scaling`; None: those are as the others."""
    rope_scaling: RopeScaling | None = None
    rotary_dim: int | None = None
    """Leading elements of each head that turn; None: all."""
    learned_positions: bool = False
    """Whether the family adds learned positions to the embedding, in the place of rotary ones."""
    layer_windows: tuple[int | None, ...] = ()
    """Per layer how many tokens a query sees, its own included; None: all. Empty: all in every layer."""
    layer_sinks: tuple[int, ...] = ()
    """Per layer how many of the first tokens a query sees besides its window. Empty: none in every layer."""
    sink_distance: Literal["true", "cache", "ceiling"] = "true"
    """How far sinks behind the window seem to be. `true`: as far as they are. `cache`: as if the tokens between them
    and the window were not there (StreamingLLM). `ceiling`: no farther than the window (LM-Infinite)."""
    attention_scale: float | None = None
    """Factor of the attention scores; None: `head_dim ** -0.5`."""
    attention_softcap: float | None = None
    """Scores s become `cap * tanh(s / cap)` before the softmax; None: they stay."""
    final_softcap: float | None = None
    """The same of the logits."""
    activation: str = "silu"
    """Of the MLP, by the name that Transformers gives it."""
    num_experts: int = 0
    """Of each layer's MLP, every one with `intermediate_size` columns; 0: the MLP is one."""
    num_experts_per_token: int = 0
    normalize_expert_weights: bool = False
    """Whether the weights of the experts that a token goes to are made to add up to one."""
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    torch_dtype: str = "float32"
    """The dtype that the files were saved in; what `dtype="auto"` means."""
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Generation ends at any of these, unless `ignore_eos`."""


class KVGroupSpec(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The layers that share one cache policy (DESIGN: KV group)."""

    layer_ids: tuple[int, ...]
    window: int | None = None
    """A query at position p sees positions p - window + 1 .. p and the first `num_sinks`; None: every one up to p."""
    num_sinks: int = 0
    residual: bool = False
    """Beside groups whose caches are int4, the last one: of every layer, in the model's dtype, the blocks that are
    being filled. A query sees the positions of its own block here, and those before it in the group of the layer."""
