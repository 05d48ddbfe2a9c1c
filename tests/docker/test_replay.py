"""The steps of Dockerfile.cpu, done in a folder instead of an image: what they leave must serve."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvarto.cluster.model_hub import resolve_model

_spec = importlib.util.spec_from_file_location("dockerfile", Path(__file__).with_name("dockerfile.py"))
assert _spec and _spec.loader
docker = importlib.util.module_from_spec(_spec)
sys.modules["dockerfile"] = docker  # dataclasses look their module up
_spec.loader.exec_module(docker)

NAME = "Dockerfile.cpu"
WHEELS = Path("/opt/wheels")
"""A folder that has torch's wheel, where the index of such wheels cannot be reached."""
START_S = 120

pytestmark = pytest.mark.slow


class Replay:
    """A stage's instructions, with the image's folders below `root` and its python in place of the base's."""

    def __init__(self, root: Path, python: Path, arguments: dict[str, str]) -> None:
        self.root = root
        self.folder = root
        self._arguments = arguments
        binaries = root / "usr/local/bin"
        binaries.mkdir(parents=True)
        (binaries / "python").symlink_to(python)
        self.environment = {
            "PATH": f"{binaries}:/usr/local/bin:/usr/bin:/bin", "HOME": str(root / "root"), "LANG": "C.UTF-8",
            # How this machine reaches its package index.
            **{key: value for key, value in os.environ.items()
               if key.startswith(("PIP_", "SSL_", "HTTP", "http", "NO_", "no_"))}}

    def placed(self, text: str) -> str:
        """`text` with the image's folders where they are here."""
        for folder in ("/opt/kvarto", "/src", "/home/kvarto", "/var/cache/kvarto"):
            text = text.replace(folder, f"{self.root}{folder}")
        return text

    def expanded(self, value: str) -> str:
        return docker.expand(self.placed(value), self.environment)

    def do(self, instruction: str, value: str) -> None:
        if instruction == "ARG":
            self.environment |= {**docker.pairs(value), **self._arguments}
        elif instruction == "ENV":
            self.environment |= docker.pairs(self.expanded(value))
        elif instruction == "WORKDIR":
            self.folder = Path(self.placed(value))
            self.folder.mkdir(parents=True, exist_ok=True)
        elif instruction == "RUN":
            self._run(value)

    def copy(self, stage) -> None:
        """Every COPY from the context; before the RUNs, which changes nothing here: no step removes a file."""
        context = docker.context()
        for sources, target in docker.sources(stage):
            for source in sources:
                is_folder = (docker.ROOT / source).is_dir()
                for path in (path for path in context if path == source or path.startswith(f"{source}/")):
                    inside = path[len(source) + 1:] if is_folder else Path(path).name
                    placed = self.root / "src" / target / inside
                    placed.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(docker.ROOT / path, placed)

    def _run(self, value: str) -> None:
        if value.startswith("apt-get update"):
            return  # needs root, and this machine's own packages are not to be changed
        done = subprocess.run(["bash", "-euc", self.placed(value)], cwd=self.folder, env=self.environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        assert done.returncode == 0, f"{value}\n{done.stdout[-3000:]}"


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The builder's steps and the environment of the final stage."""
    python = shutil.which("python3.11")
    if python is None:
        pytest.skip("the image's Python 3.11 is not on this machine")
    [builder, final] = docker.stages(NAME)
    arguments = {"TORCH_LINKS": str(WHEELS)} if WHEELS.is_dir() else {}
    replay = Replay(tmp_path_factory.mktemp("image"), Path(python).resolve(), arguments)
    replay.copy(builder)
    for instruction, value in builder.steps:
        replay.do(instruction, value)
    for value in final.values("ENV"):
        replay.do("ENV", value)
    shutil.rmtree(replay.root / "src")  # not in the final stage
    replay.do("WORKDIR", final.values("WORKDIR")[0])
    return replay


def kvarto(image, *args):
    [_, _, command] = docker.exec_form(docker.stages(NAME)[-1].values("ENTRYPOINT")[0])
    return subprocess.run([shutil.which(command, path=image.environment["PATH"]), *args], cwd=image.folder,
                          env=image.environment, capture_output=True, text=True, check=False, timeout=60)


def written(folder):
    """Every file, and when it was written last."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_entrypoint_is_there(image):
    assert "serve" in kvarto(image, *docker.exec_form(docker.stages(NAME)[-1].values("CMD")[0])).stdout
    assert "--tensor-parallel-size" in kvarto(image, "serve", "--help").stdout
    assert kvarto(image, "--version").stdout == "kvarto 0.1.0\n"


def test_kvarto_and_its_kernels_are_from_the_image(image):
    done = subprocess.run(
        ["python", "-c", "import kvarto, kvarto.kernels.native as n; from pathlib import Path; print(kvarto.__file__);"
         "print(list(Path(n.__file__).parent.glob('*.so'))[0])"],
        cwd=image.folder, env=image.environment, capture_output=True, text=True, check=True)
    [module, library] = done.stdout.splitlines()
    assert module.startswith(f"{image.root}/opt/kvarto/")
    assert library.endswith("/libkvarto_kernels.so")


def test_the_image_fetches_and_serves_and_is_healthy(image):
    # As all tests have it; the image finds it in its own cache.
    model = Path(resolve_model("smollm2-135m")).parent
    fetched = Path(image.environment["KVARTO_CACHE"]) / "models" / model.name
    fetched.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(model, fetched)
    assert kvarto(image, "fetch", "smollm2-135m").stdout.startswith(str(fetched))
    port = importlib.import_module("kvarto.cluster.cli.server_process").free_port()
    before = written(image.root / "opt")
    check = docker.stages(NAME)[-1].values("HEALTHCHECK")[0].partition("CMD ")[2].replace(":8000", f":{port}")
    server = subprocess.Popen(
        [shutil.which("kvarto", path=image.environment["PATH"]), "serve", "smollm2-135m", "--port", str(port),
         "--grpc-port", "null"], cwd=image.folder, env=image.environment, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + START_S
        while healthy := subprocess.run(docker.exec_form(check), check=False, capture_output=True).returncode:
            assert server.poll() is None, server.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert healthy == 0
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert written(image.root / "opt") == before, "the root file system is read-only"
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.kill()
