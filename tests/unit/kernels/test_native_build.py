"""The build step, with a stand-in for the compiler."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from kvarto.kernels.native import library
from kvarto.kernels.native.build import LIBRARY_NAME, NativeBuildError, build

FAKE_COMPILER = """#!/bin/sh
echo "$@" >> {log}
while [ "$1" != "-o" ]; do shift; done
echo built > "$2"
"""


@pytest.fixture
def compiler_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(FAKE_COMPILER.format(log=log))
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", f"{compiler} --flag")
    return log


def test_library_appears_alone_in_the_output_folder(compiler_log: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    assert build(output) == output / LIBRARY_NAME
    assert [path.name for path in output.iterdir()] == [LIBRARY_NAME]
    commands = compiler_log.read_text().splitlines()
    assert all(command.startswith("--flag ") for command in commands)
    assert "-shared" in commands[-1]
    assert any("-DKVARTO_ISA=portable" in command for command in commands)


def test_built_and_loaded_library_have_one_name() -> None:
    assert library.LIBRARY_PATH.name == LIBRARY_NAME


def test_current_library_is_not_built_again(compiler_log: Path, tmp_path: Path) -> None:
    built = build(tmp_path)
    compiler_log.unlink()
    build(tmp_path)
    assert not compiler_log.exists()
    os.utime(built, (0, 0))
    build(tmp_path)
    assert compiler_log.exists()


@pytest.mark.parametrize("compiler", ["false", "/nowhere/g++"])
def test_failure_names_the_command_and_leaves_nothing(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(NativeBuildError, match=re.escape(f"{compiler} -std=c++17")):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_compiler_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeBuildError, match=r"install one .*\$CXX"):
        build(tmp_path)
