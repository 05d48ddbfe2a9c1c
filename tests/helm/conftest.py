"""Fixtures of the chart's tests."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("helm_binary", Path(__file__).with_name("helm_binary.py"))
assert _spec and _spec.loader
_helm_binary = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_helm_binary)


@pytest.fixture(scope="session")
def chart() -> types.ModuleType:
    """helm_binary.py: `render`, `template`, `run`, and where the chart is."""
    _helm_binary.helm()
    return _helm_binary
