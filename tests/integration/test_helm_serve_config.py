"""The chart's RayService on a real Ray: the Serve config that it renders is what serves here."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import pytest

from kvarto.protos import inference_pb2, inference_pb2_grpc

_spec = importlib.util.spec_from_file_location("helm_ray", Path(__file__).with_name("helm_ray.py"))
assert _spec is not None and _spec.loader is not None
helm_ray = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(helm_ray)
world = helm_ray.world

KEY = world.SECRETS["keys", "api-key"]
BEARER = {"Authorization": f"Bearer {KEY}"}
PROMPT = "The capital of France is"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rendered() -> dict[str, Any]:
    objects = world.render("cpu-demo.yaml", "--set", "apiKey.existingSecret=keys")
    service: dict[str, Any] = world.of_kind(objects, "RayService")
    return service


@pytest.fixture(scope="module")
def service(rendered: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Deployed, and watched on its way: `seen` are (status of the application, /health/live, liveness probe)."""
    with helm_ray.ray_service(rendered, tmp_path_factory.mktemp("r")) as service:
        service.seen = []
        service.deploy()
        deadline = time.monotonic() + world.START_S
        while (status := service.status()) != "RUNNING":
            assert status in ("DEPLOYING", "None"), service.described()
            assert time.monotonic() < deadline, service.head.log.read_text()[-3000:]
            service.seen.append((status, service.head.probe("livenessProbe")))
            time.sleep(0.2)
        # At once: KubeRay moves traffic here now.
        service.ready_at_once = httpx.get(f"{service.url}/health/ready", timeout=10).status_code
        service.grpc_at_once = service.head.grpc_status(service.ports[helm_ray.GRPC])
        yield service


def test_the_application_is_deploying_until_a_request_would_be_served(service: Any) -> None:
    assert service.seen, "it was running before it could be seen"
    assert (service.ready_at_once, service.grpc_at_once) == (200, "SERVING")


def test_the_head_is_alive_while_the_model_is_loaded(service: Any) -> None:
    assert all(alive for _, alive in service.seen)
    assert service.head.probe("livenessProbe") and service.head.probe("readinessProbe")


def test_the_openai_client_is_answered_with_the_key_of_the_secret(service: Any) -> None:
    name = service.config["applications"][0]["args"]["model"]
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key=KEY) as client:
        completion = client.completions.create(model=name, prompt=PROMPT, max_tokens=8, temperature=0)
        assert "Paris" in completion.choices[0].text
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as client, \
            pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_grpc_is_answered_with_the_key_of_the_secret(service: Any) -> None:
    request = inference_pb2.GenerateRequest(
        text=PROMPT, sampling=inference_pb2.SamplingParameters(temperature=0, max_tokens=8, ignore_eos=True))
    with grpc.insecure_channel(f"127.0.0.1:{service.ports[helm_ray.GRPC]}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        replies = list(stub.GenerateStream(
            request, timeout=60, metadata=[("authorization", f"Bearer {KEY}")]))
        assert "Paris" in "".join(reply.text for reply in replies)
        with pytest.raises(grpc.RpcError) as refusal:
            list(stub.GenerateStream(request, timeout=60))
    assert refusal.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_the_key_is_in_the_environment_alone(service: Any, rendered: dict[str, Any]) -> None:
    assert KEY not in str(rendered)
    assert KEY not in service.described()
    assert KEY not in service.head.log.read_text()


def test_metrics_and_health_need_no_key(service: Any) -> None:
    assert "kvarto_" in httpx.get(f"{service.url}/metrics", timeout=10).text
    assert httpx.get(f"{service.url}/v1/status", timeout=10).status_code == 401


def test_pre_stop_of_the_head_lets_a_stream_finish_and_refuses_what_comes_then(service: Any) -> None:
    body = {"prompt": "Hello", "max_tokens": 800, "ignore_eos": True, "temperature": 0, "stream": True}
    begun, lines, after = threading.Event(), [], []

    def call() -> None:
        with httpx.stream("POST", f"{service.url}/v1/completions", json=body, headers=BEARER, timeout=120) as response:
            for line in response.iter_lines():
                begun.set()
                lines.append(line)

    def try_another() -> None:
        """Once it is drained, which is after the delay."""
        while httpx.get(f"{service.url}/health/ready", timeout=10).status_code == 200:
            time.sleep(0.1)
        refused = httpx.post(f"{service.url}/v1/completions", json={"prompt": "Hi"}, headers=BEARER, timeout=10)
        after.append((refused.status_code, refused.json()["error"]["code"], service.head.probe("livenessProbe"),
                      service.head.grpc_status(service.ports[helm_ray.GRPC])))

    caller, other = threading.Thread(target=call), threading.Thread(target=try_another)
    caller.start()
    assert begun.wait(60)
    other.start()
    hook = service.head.pre_stop()
    ended_s = time.monotonic()
    for thread in (caller, other):
        thread.join(60)
    assert (hook.returncode, hook.stdout.splitlines()[-1]) == (0, "all requests have finished"), hook
    assert lines[-2:] == ["data: [DONE]", ""] or lines[-1] == "data: [DONE]"
    assert after == [(503, "unavailable", True, "NOT_SERVING")]
    assert time.monotonic() - ended_s < 5
