"""The locked requirements: whole, exact, and what pyproject.toml asks for."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCKS = {"cpu": ["tracing"], "cuda": ["tracing", "gpu"]}
TARGET = {**default_environment(), "python_version": "3.11", "sys_platform": "linux", "platform_system": "Linux"}


def locked(kind):
    """(name -> version, name -> hashes) of a lock file."""
    text = (ROOT / "docker" / f"requirements-{kind}.txt").read_text()
    entries = re.findall(r"^([^\s#][^\n]*?) \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", text, re.MULTILINE)
    named = [line for line in text.splitlines() if line and not line.startswith((" ", "#"))]
    assert len(entries) == len(named), "every requirement has a version and hashes"
    requirements = [(Requirement(entry.partition(";")[0].strip()), hashes) for entry, hashes in entries]
    versions = {}
    for requirement, hashes in requirements:
        [specifier] = requirement.specifier
        assert specifier.operator == "=="
        assert hashes.count("sha256:") >= 1
        versions[canonicalize_name(requirement.name)] = specifier.version
    return versions


def wanted(extras):
    asked = PROJECT["project"]["dependencies"] + PROJECT["build-system"]["requires"]
    for extra in extras:
        asked += PROJECT["project"]["optional-dependencies"][extra]
    return [Requirement(each) for each in asked]


@pytest.mark.parametrize("kind", LOCKS)
def test_the_lock_has_all_that_the_project_asks_for(kind):
    versions = locked(kind)
    for requirement in wanted(LOCKS[kind]):
        if requirement.marker is None or requirement.marker.evaluate(TARGET):
            version = versions.get(canonicalize_name(requirement.name))
            assert version is not None, f"{requirement}: run docker/lock.sh"
            assert requirement.specifier.contains(version), f"{requirement}: {version}; run docker/lock.sh"


def test_the_processors_image_has_a_torch_without_cuda():
    versions = locked("cpu")
    assert versions["torch"].endswith("+cpu")
    assert not [name for name in versions if name.startswith(("nvidia-", "cuda-", "triton"))]


def test_the_gpus_image_has_the_same_versions_but_for_torch():
    cpu, cuda = locked("cpu"), locked("cuda")
    assert {name: version for name, version in cpu.items() if cuda.get(name) != version} == {"torch": cpu["torch"]}
    assert cpu["torch"].partition("+")[0] == cuda["torch"]
    assert "triton" in cuda and "nvidia-nccl-cu13" in cuda
