"""Real text for the quality benchmarks: the Python language reference as CPython carries it, in the order of its
topics, tokenized for a model."""

from __future__ import annotations

import platform
from pydoc_data.topics import topics

from kvarto.cluster.launcher.model import load_model_config
from kvarto.cluster.text.tokenizer import Tokenizer

NAME = f"pydoc_data.topics of CPython {platform.python_version()}"


def token_ids(model: str, count: int) -> list[int]:
    """Its first `count` tokens; a text that is too short is an error."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    found = Tokenizer.load(load_model_config(model).path).encode(text, add_special_tokens=False)[:count]
    if len(found) < count:
        raise SystemExit(f"{NAME} has {len(found)} tokens, {count} are needed")
    return found
