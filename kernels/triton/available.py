"""Whether Triton can be used, found out without importing it."""

from __future__ import annotations

import functools
import importlib.util
import os

NAME = "triton"


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors. It has to be set before Triton is imported."""
    return installed() and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def runs_on(device_type: str) -> bool:
    """`device_type`: "cuda" (which is what torch calls HIP too) or, for the interpreter, "cpu"."""
    return installed() and (interpreted() if device_type == "cpu" else device_type == "cuda")
