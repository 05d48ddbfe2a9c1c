"""The windows of a model's layers, as its `config.json` states them."""

from __future__ import annotations

from ...protos.errors import ModelLoadError
from .family import WindowRule
from .metadata import Metadata

_KINDS = ("sliding_attention", "full_attention")


def read_windows(meta: Metadata, rule: WindowRule | None, num_layers: int) -> tuple[int | None, ...]:
    """Per layer its window; empty when no layer has one. Raises `ModelLoadError`."""
    if rule is None or (rule.switch is not None and not meta.boolean(rule.switch, False)):
        return ()
    if rule.required:
        window: int | None = meta.integer("sliding_window")
    else:
        window = meta.optional_integer("sliding_window", rule.default)
    if window is None:
        return ()
    kinds = meta.strings("layer_types")
    if not kinds:
        first_layer = rule.first_layer_default
        if rule.first_layer is not None:
            first_layer = meta.integer(rule.first_layer, first_layer, minimum=0)
        full_every = rule.full_every and meta.integer("sliding_window_pattern", rule.full_every)
        return rule.windows(window, num_layers, first_layer, full_every)
    if len(kinds) != num_layers or not set(kinds) <= set(_KINDS):
        raise ModelLoadError(f"{meta.path}: 'layer_types' must name {num_layers} layers as one of {', '.join(_KINDS)}, "
                             f"got {list(kinds)}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
