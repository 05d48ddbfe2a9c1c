"""A Ray cluster as KubeRay starts it from a rendered RayService, with a process per pod."""

from __future__ import annotations

import contextlib
import importlib.util
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

_spec = importlib.util.spec_from_file_location("helm_world", Path(__file__).with_name("helm_world.py"))
assert _spec is not None and _spec.loader is not None
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)

HTTP, GRPC, GCS, DASHBOARD, AGENT, CLIENT = 8000, 9000, 6379, 8265, 52365, 10001


class RayService:
    """`head` and `workers` are pods that run; the Serve config is deployed by `deploy`."""

    def __init__(self, rendered: dict[str, Any], folder: Path) -> None:
        self._cluster = rendered["spec"]["rayClusterConfig"]
        self.config = yaml.safe_load(rendered["spec"]["serveConfigV2"])
        self._folder = folder
        self.ports = dict(zip((HTTP, GRPC, GCS, DASHBOARD, AGENT, CLIENT), world.free_ports(6), strict=True))
        assert self._cluster["authOptions"]["mode"] == "token"
        self.token = secrets.token_hex(32)
        # What KubeRay gives to every container of a cluster with authOptions.mode token.
        self._environment = {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_ADDRESS": f"127.0.0.1:{self.ports[GCS]}"}
        self.workers: dict[str, Any] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports[HTTP]}"

    def start_head(self, stack: contextlib.ExitStack) -> None:
        group = self._cluster["headGroupSpec"]
        [container] = group["template"]["spec"]["containers"]
        self.head = world.Pod(container, self.ports, self._folder / "head.log", **self._environment)
        del self.head.environment["RAY_ADDRESS"]
        flags = [f"--port={self.ports[GCS]}", f"--dashboard-port={self.ports[DASHBOARD]}", "--include-dashboard=true",
                 f"--dashboard-agent-listen-port={self.ports[AGENT]}", f"--ray-client-server-port={self.ports[CLIENT]}",
                 f"--temp-dir={self._folder}/r"]
        stack.enter_context(world.started(self.head, self._ray_start(group, "--head", *flags)))
        self.head.wait_until(lambda: self.head.probe("startupProbe"))
        self.head.environment["RAY_ADDRESS"] = self._environment["RAY_ADDRESS"]

    def start_workers(self, stack: contextlib.ExitStack) -> None:
        for group in self._cluster["workerGroupSpecs"]:
            [container] = group["template"]["spec"]["containers"]
            for index in range(group["replicas"]):
                [agent] = world.free_ports(1)
                name = f"{group['groupName']}-{index}"
                log = self._folder / f"{name}.log"
                worker = world.Pod(container, {**self.ports, AGENT: agent}, log, **self._environment)
                flags = [f"--address={self._environment['RAY_ADDRESS']}", f"--dashboard-agent-listen-port={agent}",
                         f"--node-name={name}"]
                stack.enter_context(world.started(worker, self._ray_start(group, *flags)))
                worker.wait_until(lambda worker=worker: worker.probe("startupProbe"))
                self.workers[name] = worker

    def _ray_start(self, group: dict[str, Any], *flags: str) -> list[str]:
        """As KubeRay makes the command: rayStartParams are flags of it."""
        parameters = {key: value.replace("0.0.0.0", "127.0.0.1") for key, value in group["rayStartParams"].items()}
        assert "num-cpus" in parameters, "Ray would take all CPUs of this machine"
        return ["ray", "start", "--block", "--disable-usage-stats", "--node-ip-address=127.0.0.1", *flags,
                *(f"--{key}={value}" for key, value in parameters.items())]

    def deploy(self) -> None:
        """As KubeRay does it: the very config, with other ports, to the dashboard of a head that is Ready."""
        config = {**self.config, "http_options": {**self.config["http_options"], "port": self.ports[HTTP]}}
        [application] = config["applications"]
        application = {**application, "args": {**application["args"], "grpc_port": self.ports[GRPC]}}
        assert self.head.probe("readinessProbe"), "KubeRay would wait for ever"
        answer = httpx.put(self._applications, json={**config, "applications": [application]}, timeout=30,
                           headers=self._authorization)
        assert answer.status_code == 200, answer.text

    def status(self) -> str:
        """Of the application: DEPLOYING, RUNNING, ..."""
        applications = httpx.get(self._applications, timeout=10, headers=self._authorization).json()["applications"]
        return str(applications.get("kvarto", {}).get("status"))

    def described(self) -> str:
        """All that the dashboard says of the application."""
        return httpx.get(self._applications, timeout=10, headers=self._authorization).text

    @property
    def _applications(self) -> str:
        return f"http://127.0.0.1:{self.ports[DASHBOARD]}/api/serve/applications/"

    @property
    def _authorization(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


@contextlib.contextmanager
def ray_service(rendered: dict[str, Any], folder: Path) -> Iterator[RayService]:
    """A cluster whose Serve config is not deployed yet."""
    with contextlib.ExitStack() as stack:
        service = RayService(rendered, folder)
        service.start_head(stack)
        if "workerGroupSpecs" in service._cluster:
            service.start_workers(stack)
        yield service
