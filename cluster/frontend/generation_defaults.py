"""Sampling parameters that the model's makers recommend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...protos.errors import ModelLoadError

_NAMES = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def generation_defaults(model_path: str) -> dict[str, Any]:
    """Those of `SamplingParams`' fields that the folder's `generation_config.json` sets; empty for a `.gguf` file.
    Raises `ModelLoadError` where the file is not JSON."""
    file = Path(model_path) / "generation_config.json"
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text())
    except ValueError as error:
        raise ModelLoadError(f"{file} is not valid JSON: {error}") from None
    return {name: values[name] for name in _NAMES if values.get(name) is not None}


def with_defaults(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Sampling parameters: those `given`, and of `defaults` the others. A beam search, which draws nothing, has no use
    for recommendations of how to draw."""
    return given if given.get("beam_width") is not None else defaults | given
