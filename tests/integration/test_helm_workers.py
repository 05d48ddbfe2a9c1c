"""Worker pods of the chart: where ranks are, and what the end of one pod means to the others."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

_spec = importlib.util.spec_from_file_location("helm_ray", Path(__file__).with_name("helm_ray.py"))
assert _spec is not None and _spec.loader is not None
helm_ray = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(helm_ray)
world = helm_ray.world

GROUP = ('workerGroups=[{"name": "cpu", "replicas": 2, "shmSize": "1Gi", '
         '"resources": {"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"memory": "4Gi"}}}]')
# `kvarto drain --worker` in a worker's pod. Here all Ray nodes have one address, and a driver takes the head's for its
# own, so it is told which node it is on.
DRAIN = """
import sys, ray
from kvarto.cluster import application
from kvarto.cluster.cli.app import app
application.start_ray("auto")
ray.get_runtime_context = lambda: type("Node", (), {"get_node_id": staticmethod(lambda: sys.argv[1])})
app(["drain", "--worker", "--timeout", "60"])
"""
NODES = """
import json, ray
ray.init("auto", log_to_driver=False)
table = ray.util.placement_group_table().values()
print(json.dumps({
    "names": {node["NodeID"]: node["NodeName"] for node in ray.nodes()},
    "groups": {entry["name"].split("/group")[1].split("/")[0]: list(entry["bundles_to_node_id"].values())
               for entry in table if entry["state"] == "CREATED"}}))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two worker pods of a CPU, a worker group on each."""
    objects = world.render("cpu-demo.yaml", "--set-json", GROUP, "--set", "config.num_worker_groups=2")
    with helm_ray.ray_service(world.of_kind(objects, "RayService"), tmp_path_factory.mktemp("r")) as service:
        service.deploy()
        service.head.wait_until(lambda: service.status() == "RUNNING")
        yield service


def driver(pod: Any, code: str, *args: str) -> subprocess.CompletedProcess[str]:
    result: subprocess.CompletedProcess[str] = pod.run([sys.executable, "-c", code, *args])
    return result


def groups(service: Any) -> dict[str, Any]:
    """The worker groups that work, as the server's status has them."""
    found: dict[str, Any] = httpx.get(f"{service.url}/v1/status", timeout=10).json()["groups"]
    return found


@pytest.fixture(scope="module")
def place_of(service: Any) -> dict[str, tuple[str, str]]:
    """Of each worker group: the name of its Ray node, and its id."""
    found = json.loads(driver(service.head, NODES).stdout.splitlines()[-1])
    return {index: (found["names"][node], node) for index, [node] in found["groups"].items()}


@pytest.fixture(scope="module")
def drained(service: Any, place_of: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Two requests on each group, then preStop of the pod where group 1 is. What was seen."""
    body = {"prompt": "Hello", "max_tokens": 400, "ignore_eos": True, "temperature": 0}
    answers: list[int] = []
    callers = [threading.Thread(target=lambda: answers.append(
        httpx.post(f"{service.url}/v1/completions", json=body, timeout=120).status_code)) for _ in range(4)]
    for caller in callers:
        caller.start()
    service.head.wait_until(lambda: all(group["num_running"] == 2 for group in groups(service).values()))
    name, node_id = place_of["1"]
    hook = driver(service.workers[name], DRAIN, node_id)
    after = groups(service)
    for caller in callers:
        caller.join(120)
    return {"hook": hook, "after": after, "answers": answers}


def complete(service: Any) -> int:
    """The status of a small request."""
    body = {"prompt": "Hello", "max_tokens": 2, "ignore_eos": True}
    return httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).status_code


def test_every_group_is_on_a_worker_and_none_on_the_head(place_of: dict[str, tuple[str, str]]) -> None:
    assert sorted(name for name, _ in place_of.values()) == ["cpu-0", "cpu-1"]


def test_a_worker_that_runs_is_alive(service: Any) -> None:
    assert all(worker.probe("livenessProbe") for worker in service.workers.values())


def test_pre_stop_of_a_worker_lets_its_requests_end(drained: dict[str, Any]) -> None:
    hook = drained["hook"]
    assert (hook.returncode, hook.stdout) == (
        0, "draining: 2 requests are left\nall requests have finished\n"), hook.stderr
    assert drained["after"]["1"]["num_running"] == 0
    assert drained["answers"] == [200] * 4


def test_new_requests_go_to_the_groups_that_stay(service: Any, drained: dict[str, Any]) -> None:
    steps = groups(service)["1"]["num_steps"]
    assert [complete(service) for _ in range(3)] == [200] * 3
    assert groups(service)["1"]["num_steps"] == steps
    assert httpx.get(f"{service.url}/health/ready", timeout=10).status_code == 200


def test_the_end_of_the_pod_costs_nobody_a_request(
    service: Any, drained: dict[str, Any], place_of: dict[str, tuple[str, str]],
) -> None:
    service.workers[place_of["1"][0]].end(grace_s=1)
    statuses = []
    service.head.wait_until(lambda: statuses.append(complete(service)) or set(groups(service)) == {"0"})
    assert complete(service) == 200
    assert set(statuses) == {200}
    assert httpx.get(f"{service.url}/health/ready", timeout=10).status_code == 200
