"""What an image must be, read from its Dockerfile: there is no engine here that could build it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("dockerfile", Path(__file__).with_name("dockerfile.py"))
assert _spec and _spec.loader
docker = importlib.util.module_from_spec(_spec)
sys.modules["dockerfile"] = docker  # dataclasses look their module up
_spec.loader.exec_module(docker)

PROJECT = tomllib.loads((docker.ROOT / "pyproject.toml").read_text())
every_image = pytest.mark.parametrize("name", docker.NAMES)


def final(name):
    return docker.stages(name)[-1]


def environment(stage):
    return {key: value for each in stage.values("ENV") for key, value in docker.pairs(each).items()}


@every_image
def test_hadolint_finds_nothing(name):
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed; the dev extra has it on Linux")
    found = subprocess.run([hadolint, "--no-color", f"docker/{name}"], cwd=docker.ROOT, capture_output=True, text=True,
                           check=False)
    assert (found.returncode, found.stdout) == (0, "")


@every_image
def test_bases_are_pinned_to_a_patch_release(name):
    for stage in docker.stages(name):
        assert re.fullmatch(r"python:3\.\d+\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?", stage.base), stage.base
        assert "latest" not in stage.base


@every_image
def test_the_image_is_not_run_as_root(name):
    [user] = final(name).values("USER")
    uid, gid = map(int, user.split(":"))
    assert uid >= 10_000 and gid >= 10_000
    [made] = [value for value in final(name).values("RUN") if "useradd" in value]
    assert f"--uid {uid}" in made and f"--gid {gid}" in made
    # What comes after USER runs without rights: nothing that needs them may.
    steps = [each for each, _ in final(name).steps]
    assert not {"RUN", "COPY", "ADD"} & set(steps[steps.index("USER"):])


@every_image
def test_no_compiler_source_or_build_tool_comes_with_the_final_stage(name):
    stage = final(name)
    assert docker.sources(stage) == []
    assert stage.values("ADD") == []
    packages = " ".join(stage.values("RUN"))
    assert "g++" not in packages and "pip install" not in packages
    # Triton compiles a stub in C at run time; nothing else needs a compiler.
    assert (" gcc " in packages) == (name == "Dockerfile.cuda")


@every_image
def test_what_is_copied_exists_and_is_let_into_the_context(name):
    context = docker.context()
    for stage in docker.stages(name):
        for sources, _ in docker.sources(stage):
            for source in sources:
                assert (docker.ROOT / source).exists(), source
                assert any(path == source or path.startswith(f"{source}/") for path in context), source


def test_the_context_has_every_file_of_the_packages_and_no_tests():
    context = docker.context()
    folders = [package.removeprefix("kvarto").lstrip(".").replace(".", "/") for package in
               PROJECT["tool"]["setuptools"]["packages"]]
    tracked = subprocess.run(["git", "ls-files"], cwd=docker.ROOT, capture_output=True, text=True, check=True).stdout
    expected = {path for path in tracked.splitlines()
                if path.rpartition("/")[0] in folders and path.endswith((".py", ".cpp", ".h", ".inc", ".typed"))}
    assert len(expected) > 100
    assert expected <= set(context)
    assert not [path for path in context if path.startswith(("tests/", "docs/", "helm/", ".git", ".venv"))]


@pytest.mark.parametrize("path", [
    ".venv/bin/python", "tests/conftest.py", "kernels/native/libkvarto_kernels.so", "cluster/__pycache__/head.pyc",
    "cluster/cli/__pycache__", ".git/config", "docker/lock.sh", "secrets.env", "docs/kubernetes.md"])
def test_what_is_no_source_stays_out_of_the_context(path):
    assert docker.is_ignored(path)


@every_image
def test_the_server_gets_signals_itself_and_orphans_are_reaped(name):
    assert docker.exec_form(final(name).values("ENTRYPOINT")[0]) == ["/usr/bin/tini", "--", "kvarto"]
    assert docker.exec_form(final(name).values("CMD")[0]) == ["--help"]
    assert " tini " in " ".join(final(name).values("RUN"))


@every_image
def test_the_probes_of_kuberay_find_what_they_call(name):
    """They are `bash -c` scripts that call wget; some versions of the operator start a login shell."""
    steps = " ".join(final(name).values("RUN"))
    assert re.search(r"install .*\bwget\b", steps)
    assert "/etc/profile.d/" in steps


@every_image
def test_everything_that_is_written_is_in_three_places(name):
    values = environment(final(name))
    assert values["HOME"] == "/home/kvarto"
    assert values["KVARTO_CACHE"] == "/var/cache/kvarto"
    assert values["HF_HOME"].startswith("/var/cache/kvarto/")
    assert "--owner 10001 --group 10001 /var/cache/kvarto" in " ".join(final(name).values("RUN"))


@every_image
def test_labels_say_what_the_image_is(name):
    labels = {key.removeprefix("org.opencontainers.image."): value
              for each in final(name).values("LABEL") for key, value in docker.pairs(each).items()}
    arguments = {key: value for each in final(name).values("ARG") for key, value in docker.pairs(each).items()}
    assert set(labels) >= {"title", "description", "version", "revision", "licenses"}
    assert labels["licenses"] == PROJECT["project"]["license"]
    assert docker.expand(labels["version"], arguments) == PROJECT["project"]["version"]


@every_image
def test_health_is_asked_of_the_server_and_its_ports_are_named(name):
    [check] = final(name).values("HEALTHCHECK")
    assert "http://127.0.0.1:8000/health/live" in check
    assert final(name).values("EXPOSE") == ["8000 9000"]


def test_the_images_differ_in_their_devices_alone():
    """What is mended in one is mended in the other."""
    lines = [set((docker.ROOT / "docker" / name).read_text().replace(".cuda", ".cpu").replace("-cuda", "-cpu")
                 .splitlines()) for name in docker.NAMES]
    assert len(lines[0] ^ lines[1]) <= 16
