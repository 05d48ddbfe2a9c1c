"""What sets one model family apart from another, as data: the decoder and the weight readers are the same for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ...protos.model import ModelConfig


@dataclass(frozen=True, slots=True)
class TensorNames:
    """Module names in one file format; `{i}` is the layer and `{e}` the expert, and a tensor is `<module>.weight` or
    `<module>.bias`. Parts with one name are one tensor, whose rows hold them in the order of these fields (but see
    `Family.qkv_order`). None: the family has no such part."""

    embedding: str
    attention_norm: str
    q: str
    k: str
    v: str
    o: str
    mlp_norm: str | None
    """None: the MLP reads what attention reads. Only where `Family.parallel`."""
    gate: str | None
    up: str
    down: str
    final_norm: str
    lm_head: str
    positions: str | None = None
    """Learned positions, in the place of rotary ones."""
    q_norm: str | None = None
    k_norm: str | None = None
    """Norms over the elements of every head, before it turns."""
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    """Norms of what is added to the residual stream."""
    router: str | None = None
    """Chooses the experts of a token."""

    def of(self, part: str) -> str | None:
        name: str | None = getattr(self, part)
        return name


@dataclass(frozen=True, slots=True)
class ConfigKeys:
    """Keys of `config.json`; the defaults are what most families use. None: the family has no such key."""

    hidden_size: str = "hidden_size"
    intermediate_size: str = "intermediate_size"
    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    num_kv_heads: str = "num_key_value_heads"
    multi_query: str | None = None
    """Decides between one KV head (the default) and one per query head, in the place of `num_kv_heads`."""
    head_dim: str = "head_dim"
    vocab_size: str = "vocab_size"
    max_positions: str = "max_position_embeddings"
    norm_eps: str = "rms_norm_eps"
    activation: str = "hidden_act"
    attention_bias: str = "attention_bias"
    mlp_bias: str = "mlp_bias"
    tie_embeddings: str = "tie_word_embeddings"
    query_scalar: str | None = None
    """Attention scores are multiplied by its inverse square root."""
    num_experts: tuple[str, ...] = ("num_local_experts", "num_experts")
    num_experts_per_token: str = "num_experts_per_tok"


@dataclass(frozen=True, slots=True)
class WindowRule:
    """Which layers see no more than the last `sliding_window` tokens. `layer_types` comes before `first_layer` and
    `full_every`, where the file has it."""

    default: int | None = None
    """The window where the file says nothing; a null in the file means that there is none."""
    required: bool = False
    """The file must state a window: the family's layers differ in more than that."""
    switch: str | None = None
    """Key that must be true for there to be windows."""
    first_layer: str | None = None
    """Key of the first layer with a window."""
    first_layer_default: int = 0
    full_every: int | None = None
    """Every such layer, counted from one, has no window; a file may say otherwise under `sliding_window_pattern`."""

    def windows(self, window: int, num_layers: int, first_layer: int, full_every: int | None
                ) -> tuple[int | None, ...]:
        """Per layer its window."""
        return tuple(window if layer >= first_layer and (full_every is None or (layer + 1) % full_every) else None
                     for layer in range(num_layers))


@dataclass(frozen=True, slots=True)
class GGUFLayout:
    """How GGUF files hold a family. Whatever the family: weights lie rows first, and norms have their 1 added."""

    architectures: tuple[str, ...]
    """Values of `general.architecture`."""
    names: TensorNames
    interleaves_rope: bool = False
    """The q and k rows of a head lie in pairs (j, j + head_dim / 2)."""
    num_width_scaled_layers: int | None = None
    """The files do not say what `query_scalar` was. llama.cpp tells the one size of the family where it is hidden_size
    per head by its number of layers, this one; elsewhere it is head_dim."""


@dataclass(frozen=True, slots=True)
class Family:
    """One family of decoders: attention and an MLP over normed inputs, each added to the residual stream."""

    name: str
    architectures: tuple[str, ...]
    """Values of `architectures` in `config.json`."""
    model_types: tuple[str, ...]
    """Values of `model_type` in `config.json`, looked at when it names no architecture."""
    hf_names: TensorNames
    gguf: GGUFLayout | None = None
    """None: GGUF files of this family are not read."""
    hf_prefix: str = ""
    """Beginning of every Hugging Face name that some files leave off."""
    activations: tuple[str, ...] = ("silu",)
    """Those that the family may have, by the names that Transformers gives them; the first is the default."""
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    """`rms_plus_one`: the stored weight is one less than the factor. `layer`: with mean and bias."""
    transposed: tuple[str, ...] = ()
    """Parts whose Hugging Face weight is `[in_features, out_features]`."""
    qkv_order: Literal["parts", "kv_heads"] = "parts"
    """Rows where q, k and v are one tensor: all of q, of k, of v; or per KV head its queries, its k, its v."""
    config_keys: ConfigKeys = ConfigKeys()
    parallel: bool = False
    """Attention and MLP read the same residual stream, and are added to it at once."""
    when: Mapping[str, object] = field(default_factory=dict)
    """Keys of `config.json` whose values tell the family from others of its architecture; an absent one is false."""
    only: Mapping[str, object] = field(default_factory=dict)
    """Keys of `config.json` that change what is computed, with the one value supported; absent or null is that too."""
    windows: WindowRule | None = None
    tie_embeddings_default: bool = False
    """This and the other defaults: what it means when `config.json` does not say."""
    head_dim_default: int | None = None
    """None: hidden_size per head."""
    mlp_ratio_default: int | None = None
    """intermediate_size / hidden_size; None: the file must say."""
    rope_theta_default: float = 10000.0
    local_rope_theta_default: float | None = None
    """None: layers with a window have no rotary base of their own."""
    attention_softcap_default: float | None = None
    final_softcap_default: float | None = None
    has_softcaps: bool = False
    partial_rotary: bool = False
    """Whether `partial_rotary_factor` means anything."""
    scales_embedding: bool = False
    """Embeddings are multiplied by `hidden_size ** 0.5`."""
    always_biased: tuple[str, ...] = ()
    """Parts that have a bias whatever the file says."""
    attention_bias_on: tuple[str, ...] = ()
    """Parts that have one when `attention_bias` is set."""
    mlp_bias_on: tuple[str, ...] = ()
    normalizes_experts: bool | None = None
    """Whether a token's expert weights are made to add up to one; None: `norm_topk_prob` says."""

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies its inner columns by gates."""
        return self.hf_names.gate is not None

    @property
    def has_experts(self) -> bool:
        return self.hf_names.router is not None

    def biased(self, config: ModelConfig) -> tuple[str, ...]:
        """The parts that have a bias, but for norms."""
        return (self.always_biased + (self.attention_bias_on if config.attention_bias else ())
                + (self.mlp_bias_on if config.mlp_bias else ()))
