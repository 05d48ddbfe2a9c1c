"""kvarto: paged-KV-cache LLM serving on Ray. Importing it loads neither torch nor Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cluster.frontend.async_llm import AsyncLLM
    from .cluster.frontend.llm import LLM
    from .cluster.outputs import CompletionOutput, RequestOutput
    from .cluster.serve_app import build_app
    from .protos.config import EngineConfig, ServeConfig
    from .protos.errors import KvartoError
    from .protos.sampling import SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "AsyncLLM": ".cluster.frontend.async_llm",
    "LLM": ".cluster.frontend.llm",
    "CompletionOutput": ".cluster.outputs",
    "RequestOutput": ".cluster.outputs",
    "build_app": ".cluster.serve_app",
    "EngineConfig": ".protos.config",
    "ServeConfig": ".protos.config",
    "KvartoError": ".protos.errors",
    "SamplingParams": ".protos.sampling",
}

__all__ = [
    "AsyncLLM", "CompletionOutput", "EngineConfig", "KvartoError", "LLM", "RequestOutput", "SamplingParams",
    "ServeConfig", "__version__", "build_app",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kvarto' has no attribute '{name}'")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value
