"""Which backend is chosen, and that a missing library is loud."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvarto.kernels import available_backends, backend, linear, pack_linear
from kvarto.kernels.native import library


@pytest.fixture
def no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    path = tmp_path / "libkvarto_kernels.so"
    monkeypatch.setattr(library, "LIBRARY_PATH", path)
    library.load_library.cache_clear()
    monkeypatch.delenv("KVARTO_KERNELS", raising=False)
    yield path
    library.load_library.cache_clear()


def test_the_native_library_is_built() -> None:
    assert "native-portable" in available_backends(), f"build it: {library.HOW_TO_BUILD}"


def test_auto_takes_the_best_and_the_environment_is_read_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KVARTO_KERNELS", raising=False)
    assert backend() == available_backends()[-1]
    for name in available_backends():
        monkeypatch.setenv("KVARTO_KERNELS", name)
        assert backend() == name
    monkeypatch.setenv("KVARTO_KERNELS", "reference")
    assert backend() == "torch-reference"


def test_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVARTO_KERNELS", "native-z80")
    with pytest.raises(ValueError, match=r"native-z80.*torch-reference"):
        backend()


@pytest.mark.usefixtures("no_library")
def test_missing_library_warns_once_says_what_to_do_and_still_works() -> None:
    with pytest.warns(RuntimeWarning, match=r"does not exist.*compiler.*pip install") as warned:
        out = linear(torch.ones(2, 4), pack_linear(torch.eye(4)))
    assert len(warned) == 1
    assert torch.equal(out, torch.ones(2, 4))
    assert available_backends() == ("torch-reference",)
    assert backend() == "torch-reference"


def test_unloadable_library_warns(no_library: Path) -> None:
    no_library.write_bytes(b"not a library")
    with pytest.warns(RuntimeWarning, match="cannot be loaded"):
        assert backend() == "torch-reference"
