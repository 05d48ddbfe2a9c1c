"""Fixtures of the kernel tests: every test that takes `backend` runs on each backend of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvarto.kernels import available_backends
from kvarto.kernels.triton import available

NATIVE = [name for name in available_backends() if name.startswith("native-")]


@pytest.fixture(params=available_backends())
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KVARTO_KERNELS", request.param)
    return str(request.param)


@pytest.fixture(params=[*available_backends(), *([available.NAME] if available.runs_on("cpu") else [])])
def any_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Triton's interpreter too, which is slow."""
    monkeypatch.setenv("KVARTO_KERNELS", request.param)
    return str(request.param)


@pytest.fixture(params=NATIVE)
def native_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("KVARTO_KERNELS", request.param)
    return str(request.param)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """The same random numbers for every test; one thread, which busy neighbours disturb least."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
