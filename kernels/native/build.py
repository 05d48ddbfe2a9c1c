"""Builds libkvarto_kernels.so from the C++ sources beside this file. Standard library only: setup.py calls it.

Each `*_isa.cpp` is compiled once per instruction set; which one runs is decided at run time. Needs a C++17
compiler with OpenMP (GCC 10 or newer): `$CXX`, else `c++`, else `g++`. Run as a program, this file rebuilds the
library beside the sources.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE_DIR = Path(__file__).resolve().parent
LIBRARY_NAME = "libkvarto_kernels.so"

# No contraction: a sum must not be fused in one inlined copy of a kernel and not in another.
COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno"]
COMMON_FLAGS += ["-Wall", "-Wextra"]
# Only vectors inlined into one translation unit are passed around; GCC 12's own AVX-512 headers trip the others.
COMMON_FLAGS += ["-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [*AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
X86_ISA_FLAGS = {
    "portable": [],
    "avx2": AVX2_FLAGS,
    "avx512": AVX512_FLAGS,
    "avx512_bf16": [*AVX512_FLAGS, "-mavx512bf16", "-mavx512vnni"],
}


class NativeBuildError(RuntimeError):
    """The native kernels could not be built; the message holds the failing command and its output."""


def build(output_dir: Path) -> Path:
    """Compile and link the library into `output_dir`, which must exist, and return its path.

    Does nothing if a library newer than every source is already there. The library appears atomically, so
    that two builds at once or an interrupted one leave no half-written file.

    Raises:
        NativeBuildError: there is no C++ compiler, or it failed.
    """
    library = Path(output_dir) / LIBRARY_NAME
    if _is_current(library):
        return library
    compiler = _find_compiler()
    with tempfile.TemporaryDirectory(prefix=".build-", dir=output_dir) as work_dir:
        commands = _compile_commands(compiler, Path(work_dir))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands.values()))
        linked = Path(work_dir) / LIBRARY_NAME
        _run([*compiler, "-shared", "-fopenmp", *map(str, commands), "-o", str(linked)])
        linked.replace(library)
    return library


def _is_current(library: Path) -> bool:
    sources = [path for path in SOURCE_DIR.iterdir() if path.suffix in {".cpp", ".h", ".inc", ".py"}]
    built = library.stat().st_mtime if library.exists() else 0.0
    return built > max(source.stat().st_mtime for source in sources)


def _find_compiler() -> list[str]:
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    found = shutil.which("c++") or shutil.which("g++")
    if found is None:
        raise NativeBuildError("no C++ compiler: install one (Debian: apt-get install g++) or name it in $CXX")
    return [found]


def _compile_commands(compiler: list[str], work_dir: Path) -> dict[Path, list[str]]:
    """Object file -> the command that makes it."""
    is_x86 = platform.machine().lower() in {"x86_64", "amd64"}
    commands: dict[Path, list[str]] = {}
    for source in sorted(SOURCE_DIR.glob("*.cpp")):
        variants: dict[str, list[str]] = {"": []}
        if source.stem.endswith("_isa"):
            isa_flags = X86_ISA_FLAGS if is_x86 else {"portable": []}
            variants = {isa: [f"-DKVARTO_ISA={isa}", *flags] for isa, flags in isa_flags.items()}
        for name, flags in variants.items():
            target = work_dir / f"{source.stem}-{name}.o"
            commands[target] = [*compiler, *COMMON_FLAGS, *flags, "-c", str(source), "-o", str(target)]
    return commands


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise NativeBuildError(f"cannot run {shlex.join(command)}: {error}") from error
    if done.returncode != 0:
        raise NativeBuildError(f"command failed ({done.returncode}): {shlex.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)


if __name__ == "__main__":
    try:
        print(build(SOURCE_DIR))
    except NativeBuildError as error:
        sys.exit(str(error))
