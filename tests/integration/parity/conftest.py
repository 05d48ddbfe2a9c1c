"""Fixtures of the parity tests: the model, the prompts, and Transformers as the oracle."""

from __future__ import annotations

import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvarto.cluster.model_hub import resolve_model

SETTLE_S = 10.0
"""A plan in flight still names blocks whose sequences have ended; it ends well within this."""


@pytest.fixture(scope="session")
def oracle_module() -> ModuleType:
    """The module beside this one: pytest's importlib mode puts no test folder on the path. A fixture, so that
    Transformers is imported where it is used and not wherever tests are collected."""
    spec = importlib.util.spec_from_file_location("parity_oracle", Path(__file__).with_name("oracle.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up there.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def model_path() -> str:
    return resolve_model("smollm2-135m")


@pytest.fixture(scope="session")
def prompts(oracle_module: ModuleType, model_path: str) -> list[Any]:
    """The 32 prompts, each with its `name` and `token_ids`."""
    return oracle_module.read_prompts(model_path)


@pytest.fixture(scope="session")
def oracle(oracle_module: ModuleType, model_path: str, prompts: list[Any]) -> Any:
    return oracle_module.Oracle(model_path, prompts)


@pytest.fixture(scope="session")
def settled_status() -> Any:
    """A function: the status of an `LLM`'s one worker group once it is idle and no block is *releasing*."""

    def wait(llm: Any) -> dict[str, Any]:
        deadline = time.monotonic() + SETTLE_S
        while True:
            status = llm.status()["groups"]["0"]
            busy = status["num_running"] or status["num_waiting"] or status["blocks"]["releasing"]
            if not busy or time.monotonic() > deadline:
                return status
            time.sleep(0.05)

    return wait
