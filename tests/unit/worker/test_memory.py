"""What a rank believes it may take, read from a fake root of the file system."""

from __future__ import annotations

import pytest
import torch

from kvarto.worker.memory import available_bytes

CPU = torch.device("cpu")
MIB = 2**20
V2 = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory.current", "sys/fs/cgroup/memory.stat")
V1 = ("sys/fs/cgroup/memory/memory.limit_in_bytes", "sys/fs/cgroup/memory/memory.usage_in_bytes",
      "sys/fs/cgroup/memory/memory.stat")
BOTH = pytest.mark.parametrize("names", [V2, V1], ids=["v2", "v1"])


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")

    write("proc/meminfo", f"MemTotal: {900 * 1024} kB\nMemFree: 1 kB\nMemAvailable: {800 * 1024} kB")
    return write


def test_without_a_cgroup_the_machine_decides(write, tmp_path):
    assert available_bytes(CPU, tmp_path) == 800 * MIB


@BOTH
def test_the_limit_of_a_container_decides_when_it_is_tighter(write, tmp_path, names):
    write(names[0], 300 * MIB)
    write(names[1], 100 * MIB)
    assert available_bytes(CPU, tmp_path) == 200 * MIB


@BOTH
def test_the_machine_decides_when_it_is_tighter_than_the_container(write, tmp_path, names):
    write(names[0], 5000 * MIB)
    write(names[1], 0)
    assert available_bytes(CPU, tmp_path) == 800 * MIB


@BOTH
def test_the_page_cache_of_a_container_counts_as_available(write, tmp_path, names):
    write(names[0], 300 * MIB)
    write(names[1], 250 * MIB)
    write(names[2], f"anon 5\ninactive_file {60 * MIB}")
    assert available_bytes(CPU, tmp_path) == 110 * MIB


@pytest.mark.parametrize(("names", "limit"), [(V2, "max"), (V1, 9223372036854771712)])
def test_a_container_without_a_limit_leaves_it_to_the_machine(write, tmp_path, names, limit):
    write(names[0], limit)
    write(names[1], 100 * MIB)
    assert available_bytes(CPU, tmp_path) == 800 * MIB


@BOTH
def test_a_container_past_its_limit_has_nothing_rather_than_less(write, tmp_path, names):
    write(names[0], 300 * MIB)
    write(names[1], 301 * MIB)
    assert available_bytes(CPU, tmp_path) == 0


def test_a_limit_without_a_usage_is_not_guessed_at(write, tmp_path):
    write(V2[0], 300 * MIB)
    assert available_bytes(CPU, tmp_path) == 800 * MIB


def test_a_machine_that_does_not_say_is_an_error(write, tmp_path):
    write("proc/meminfo", "MemTotal: 5 kB")
    with pytest.raises(RuntimeError, match="MemAvailable"):
        available_bytes(CPU, tmp_path)
