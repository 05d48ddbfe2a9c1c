"""vLLM's CPU build at the best settings known for it: every core bound, tcmalloc and Intel's OpenMP preloaded."""

from __future__ import annotations

import ctypes.util
import os
import subprocess
from pathlib import Path

KV_POOL_GIB = 2
"""vLLM takes whole GiB."""
_TCMALLOC_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/local/lib")


def environment(python: str) -> tuple[dict[str, str], list[str]]:
    """Variables for a process of `python`, vLLM's interpreter; and a note for each library that is not there."""
    cores = sorted(os.sched_getaffinity(0))
    found, notes = [], []
    for name, paths in (("libtcmalloc_minimal.so.4", _tcmalloc()), ("libiomp5.so", _iomp(python))):
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            notes.append(f"vLLM ran without {name}, which was not found on this machine")
        else:
            found.append(str(path))
    variables = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_POOL_GIB), "LD_PRELOAD": ":".join(found),
        "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **variables}, notes


def _tcmalloc() -> list[Path]:
    named = [Path(folder) / "libtcmalloc_minimal.so.4" for folder in _TCMALLOC_FOLDERS]
    name = ctypes.util.find_library("tcmalloc_minimal")
    return [*named, *(Path(folder) / name for folder in _TCMALLOC_FOLDERS if name)]


def _iomp(python: str) -> list[Path]:
    prefix = subprocess.run(
        [python, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True, check=True).stdout.strip()
    return [Path(prefix) / "lib" / "libiomp5.so"]
