"""What Kubernetes and KubeRay make of a rendered chart, on this machine: containers as processes, the pod's own ports
replaced by free ones, secrets as environment variables."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import httpx
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "helm" / "kvarto" / "examples"
START_S = 120
SECRETS = {("keys", "api-key"): "secret-0815"}
"""What the Secrets of the cluster hold, by name and key."""
IMAGE_PATHS = ("HOME", "KVARTO_CACHE", "HF_HOME")
"""Environment variables that name folders of the image."""


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def render(example: str | None, *args: str) -> list[dict[str, Any]]:
    """The objects of the chart with an example's values. Skips the test where helm cannot be had."""
    chart: list[dict[str, Any]] = load(ROOT / "tests" / "helm" / "helm_binary.py").render(
        EXAMPLES / example if example else None, *args)
    return chart


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    [found] = [each for each in objects if each["kind"] == kind]
    return found


def free_ports(count: int) -> list[int]:
    from kvarto.cluster.cli.server_process import free_port

    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return sorted(ports)


def environment_of(container: dict[str, Any]) -> dict[str, str]:
    """What the container's processes see, as `env` of the chart says it."""
    values = {}
    for entry in container["env"]:
        if reference := entry.get("valueFrom", {}).get("secretKeyRef"):
            values[entry["name"]] = SECRETS[reference["name"], reference["key"]]
        elif entry["name"] not in IMAGE_PATHS:
            values[entry["name"]] = entry["value"]
    return values


class Pod:
    """A container of the chart as a process group. `ports`: those of the chart -> those used here."""

    def __init__(self, container: dict[str, Any], ports: dict[int, int], log: Path, **environment: str) -> None:
        self.container = container
        self.ports = ports
        self.log = log
        binaries = Path(sys.executable).parent
        self.environment = {
            **os.environ, **environment_of(container), **environment, "PYTHONUNBUFFERED": "1",
            "PATH": f"{binaries}:{os.environ['PATH']}"}
        self.process: subprocess.Popen[bytes] | None = None

    def here(self, text: str) -> str:
        """`text` with the ports that are used here."""
        for port, free in self.ports.items():
            text = text.replace(f":{port}", f":{free}")
        return text

    def start(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, env=self.environment, stdout=self.log.open("w"), stderr=subprocess.STDOUT)

    def run(self, command: list[str], timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """`kubectl exec`, a probe or a hook."""
        return subprocess.run([self.here(word) for word in command], env=self.environment, capture_output=True,
                              text=True, timeout=timeout_s, check=False)

    def probe(self, name: str) -> bool:
        """Whether the container's probe of this name succeeds now, by the kubelet's rules."""
        probe = self.container[name]
        timeout_s = probe.get("timeoutSeconds", 1)
        if "exec" in probe:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.run(probe["exec"]["command"], timeout_s).returncode == 0
            return False
        if "grpc" in probe:
            return self.grpc_status(self.ports[int(probe["grpc"]["port"])], timeout_s) == "SERVING"
        try:
            port = self.ports[port_number(self.container, probe["httpGet"]["port"])]
            return 200 <= httpx.get(f"http://127.0.0.1:{port}{probe['httpGet']['path']}",
                                    timeout=timeout_s).status_code < 400
        except httpx.TransportError:
            return False

    def grpc_status(self, port: int, timeout_s: float = 5) -> str:
        """Of `grpc.health.v1`, or the code that it failed with."""
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            try:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
            except grpc.RpcError as error:
                return str(error.code().name)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))

    def pre_stop(self) -> subprocess.CompletedProcess[str]:
        return self.run(self.container["lifecycle"]["preStop"]["exec"]["command"])

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = START_S) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert self.process is None or self.process.poll() is None, self.log.read_text()[-3000:]
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.1)

    def end(self, grace_s: float = 30) -> int:
        """SIGTERM, and after `grace_s` SIGKILL; no child is left then. Returns the exit code."""
        assert self.process is not None
        left = []
        with contextlib.suppress(psutil.NoSuchProcess):
            left = psutil.Process(self.process.pid).children(recursive=True)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def port_number(container: dict[str, Any], port: int | str) -> int:
    """Of a port that a probe names."""
    if isinstance(port, int):
        return port
    [number] = [int(each["containerPort"]) for each in container["ports"] if each["name"] == port]
    return number


@contextlib.contextmanager
def started(pod: Pod, command: list[str]) -> Iterator[Pod]:
    pod.start(command)
    try:
        yield pod
    finally:
        pod.end(grace_s=2)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
