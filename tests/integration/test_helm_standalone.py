"""The chart's Deployment as a process: its command, configuration, probes, secret and preStop on a real server."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

_spec = importlib.util.spec_from_file_location("helm_world", Path(__file__).with_name("helm_world.py"))
assert _spec is not None and _spec.loader is not None
world = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(world)

BEARER = {"Authorization": f"Bearer {world.SECRETS['keys', 'api-key']}"}
HTTP, GRPC = 8000, 9000

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pod(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Started, and watched until it is ready: `seen` are the probes' results on the way."""
    folder = tmp_path_factory.mktemp("standalone")
    objects = world.render("cpu-demo.yaml", "--set", "mode=standalone,apiKey.existingSecret=keys")
    spec = world.of_kind(objects, "Deployment")["spec"]["template"]["spec"]
    [container] = spec["containers"]
    pod = world.Pod(container, dict(zip((HTTP, GRPC), world.free_ports(2), strict=True)), folder / "log")
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == {"http": HTTP, "grpc": GRPC}
    [(name, text)] = world.of_kind(objects, "ConfigMap")["data"].items()
    config = {**yaml.safe_load(text), "port": pod.ports[HTTP], "grpc_port": pod.ports[GRPC]}
    (folder / name).write_text(yaml.safe_dump(config))
    [mount] = [each["mountPath"] for each in container["volumeMounts"] if each["name"] == "config"]
    assert "command" not in container  # the image's entrypoint, which ends in kvarto
    command = ["kvarto", *(word.replace(f"{mount}/{name}", str(folder / name)) for word in container["args"])]
    pod.grace_s, pod.seen = spec["terminationGracePeriodSeconds"], []
    with world.started(pod, command):
        pod.wait_until(lambda: world.is_listening(pod.ports[HTTP]))
        pod.wait_until(lambda: look(pod)["startupProbe"] and look(pod)["readinessProbe"])
        yield pod


def look(pod: Any) -> dict[str, Any]:
    """What the kubelet would see now; kept."""
    now = {name: pod.probe(name) for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    now["grpc"] = pod.grpc_status(pod.ports[GRPC])
    pod.seen.append(now)
    return now


def test_probes_turn_when_the_model_is_loaded(pod: Any) -> None:
    assert (pod.seen[0]["startupProbe"], pod.seen[0]["readinessProbe"], pod.seen[0]["grpc"]) == (
        False, False, "UNAVAILABLE")
    assert look(pod) == {"startupProbe": True, "readinessProbe": True, "livenessProbe": True, "grpc": "SERVING"}
    ready = [now["readinessProbe"] for now in pod.seen]
    assert ready == sorted(ready), "once ready, it stays so"


def test_the_key_of_the_secret_is_asked_for(pod: Any) -> None:
    body = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    refused = httpx.post(f"http://127.0.0.1:{pod.ports[HTTP]}/v1/completions", json=body, timeout=30)
    answer = httpx.post(f"http://127.0.0.1:{pod.ports[HTTP]}/v1/completions", json=body, timeout=30, headers=BEARER)
    assert (refused.status_code, answer.status_code) == (401, 200)
    assert "Paris" in answer.json()["choices"][0]["text"]


def test_pre_stop_then_sigterm_ends_the_pod_in_its_grace_period(pod: Any) -> None:
    hook = pod.pre_stop()
    assert (hook.returncode, hook.stdout.splitlines()[-1]) == (0, "all requests have finished"), hook
    now = look(pod)
    assert (now["readinessProbe"], now["livenessProbe"], now["grpc"]) == (False, True, "NOT_SERVING")
    refused = httpx.post(f"http://127.0.0.1:{pod.ports[HTTP]}/v1/completions", json={"prompt": "Hi"}, headers=BEARER,
                         timeout=10)
    assert refused.status_code == 503
    assert pod.end() == 0
    words = pod.container["lifecycle"]["preStop"]["exec"]["command"]
    hook_s = sum(float(words[words.index(flag) + 1]) for flag in ("--delay", "--timeout"))
    assert pod.grace_s >= hook_s + 10
