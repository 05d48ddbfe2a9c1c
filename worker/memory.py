"""How much memory this process may still take: the container's limit first, then the machine's."""

from __future__ import annotations

from pathlib import Path

import torch

_UNLIMITED = 2**60
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes",
     "/sys/fs/cgroup/memory/memory.stat"),
)


def available_bytes(device: torch.device, root: Path = Path("/")) -> int:
    """Bytes that can be allocated on `device` now. On a CPU the smaller of what the cgroup (v2 or v1) and
    `/proc/meminfo` allow; the kernel's reclaimable page cache counts as
    available. `root` is for tests."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([_machine_bytes(root), *_cgroup_bytes(root)])


def _machine_bytes(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable line")


def _cgroup_bytes(root: Path) -> list[int]:
    found = []
    for limit_name, used_name, stat_name in _CGROUPS:
        limit_file, used_file = root / limit_name[1:], root / used_name[1:]
        if not limit_file.exists() or not used_file.exists():
            continue
        limit = limit_file.read_text().strip()
        if limit == "max" or int(limit) >= _UNLIMITED:
            continue
        stat_file = root / stat_name[1:]
        stat = dict(line.split() for line in stat_file.read_text().splitlines()) if stat_file.exists() else {}
        reclaimable = int(stat.get("inactive_file", 0))
        found.append(max(0, int(limit) - int(used_file.read_text()) + reclaimable))
    return found
