"""What `attention_pattern` makes of a model: which tokens its layers see."""

from __future__ import annotations

import msgspec

from ..protos.config import EngineConfig
from ..protos.errors import ConfigError
from ..protos.model import ModelConfig

_DEFAULT_SINKS = {"streaming_llm": 4, "lm_infinite": 10}
_SINK_DISTANCE = {"streaming_llm": "cache", "lm_infinite": "ceiling"}


def apply_pattern(config: EngineConfig, model: ModelConfig) -> ModelConfig:
    """The model with the pattern in its layers of full attention; layers with a window of their own keep it.

    Raises `ConfigError` where the pattern does not go with the model.
    """
    if config.attention_pattern == "model":
        return model
    window = config.attention_window
    assert window is not None, "checked when the configuration is read"
    windows = model.layer_windows or (None,) * model.num_layers
    patterned = [own is None for own in windows]
    if not any(patterned):
        raise ConfigError(f"attention_pattern={config.attention_pattern!r} changes layers that see everything, and "
                          f"every layer of {model.path} has a window: leave attention_pattern unset",
                          param="attention_pattern")
    if model.learned_positions and config.attention_pattern in _SINK_DISTANCE:
        raise ConfigError(f"attention_pattern={config.attention_pattern!r} moves rotary positions, and {model.path} "
                          "learned its positions: use sliding_window or longformer", param="attention_pattern")
    num_sinks = config.attention_sinks
    if num_sinks is None:
        num_sinks = _DEFAULT_SINKS.get(config.attention_pattern, 0)
    return msgspec.structs.replace(
        model, layer_windows=tuple(window if changed else own
                                   for own, changed in zip(windows, patterned, strict=True)),
        layer_sinks=tuple(num_sinks if changed else 0 for changed in patterned),
        sink_distance=_SINK_DISTANCE.get(config.attention_pattern, "true"))


def longest(config: EngineConfig, model: ModelConfig) -> int | None:
    """Most tokens that `max_model_len` may be for the patterned model; None: any number.

    No query is farther from a key than the model was made for when every layer has a window and sinks behind it seem
    near; then a sequence may go on for ever.
    """
    made_for = model.max_position_embeddings
    scaling = model.rope_scaling.kind if model.rope_scaling else None
    endless = (config.attention_pattern in ("sliding_window", "streaming_llm", "lm_infinite")
               and all(window is not None for window in model.layer_windows)
               and not model.learned_positions and scaling not in ("dynamic", "longrope"))
    if not endless:
        return made_for
    reach = max((window or 0) + sinks for window, sinks in zip(model.layer_windows, model.layer_sinks, strict=True))
    return None if reach <= made_for else made_for
