"""Models, health, metrics, version, status and the API key."""

from __future__ import annotations

import asyncio
import importlib.util
import threading
from pathlib import Path

import httpx
import openai
import pytest

from kvarto.cluster.frontend_protocol import Health
from kvarto.protos.errors import UnavailableError

_spec = importlib.util.spec_from_file_location("http_fake", Path(__file__).with_name("http_fake.py"))
assert _spec and _spec.loader
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)

OPEN = ["/health", "/health/live", "/health/ready", "/version", "/metrics"]


@pytest.fixture(scope="module")
def server():
    with fake.shared_server() as server:
        yield server


@pytest.fixture
def frontend(server):
    return server(fake.FakeFrontend(fake.make_config()))


@pytest.fixture
def url(frontend):
    return frontend.url


@pytest.fixture(scope="module")
def locked_url():
    frontend = fake.FakeFrontend(fake.make_config(api_key="söcret"))
    with fake.running(frontend) as url:
        yield url


def test_models_lists_the_served_model_and_finds_it_by_a_name_with_a_slash(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x") as client:
        [model] = client.models.list().data
        assert (model.id, model.object, model.max_model_len) == (fake.MODEL, "model", 512)
        assert httpx.get(f"{url}/v1/models/{fake.MODEL}").json()["id"] == fake.MODEL
        assert client.models.retrieve(fake.MODEL).id == fake.MODEL
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("other")


def test_health_is_the_frontends(url, frontend):
    assert [httpx.get(url + path).status_code for path in OPEN[:3]] == [200, 200, 200]
    frontend.state = Health(live=True, ready=False, reason="rank 1 is dead")
    assert [httpx.get(url + path).status_code for path in OPEN[:3]] == [503, 200, 503]
    assert httpx.get(f"{url}/health/ready").json()["reason"] == "rank 1 is dead"
    frontend.state = Health(live=False, ready=False, reason="the event loop of the engine is dead")
    assert httpx.get(f"{url}/health/live").status_code == 503


def test_metrics_are_prometheus_text(url):
    response = httpx.get(f"{url}/metrics")
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "kvarto_running 3" in response.text


def test_version_and_status(url):
    assert httpx.get(f"{url}/version").json()["version"]
    assert httpx.get(f"{url}/v1/status").json() == {"groups": [{"state": "ready"}]}


def test_blocks_are_the_frontends(url):
    assert httpx.get(f"{url}/v1/blocks").json() == {"groups": {}}


def test_blocks_need_the_key(locked_url):
    response = httpx.get(f"{locked_url}/v1/blocks")
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    headers = {"Authorization": "Bearer söcret".encode()}
    assert httpx.get(f"{locked_url}/v1/blocks", headers=headers).status_code == 200


def test_blocks_of_an_engine_that_is_gone_are_unavailable(url, frontend, monkeypatch):
    async def blocks():
        raise UnavailableError("no Head")

    monkeypatch.setattr(frontend, "blocks", blocks)
    response = httpx.get(f"{url}/v1/blocks")
    assert (response.status_code, response.json()["error"]["message"]) == (503, "no Head")


@pytest.mark.parametrize("header", [None, "Bearer", "Bearer wrong", "Basic söcret", "söcret", "Bearer söcre"])
def test_a_missing_or_wrong_key_is_refused_before_the_body_is_looked_at(locked_url, header):
    headers = {} if header is None else {"Authorization": header.encode()}
    for path in ("completions", "chat/completions"):
        response = httpx.post(f"{locked_url}/v1/{path}", content=b"{", headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(f"{locked_url}/v1/models", headers=headers).status_code == 401


def test_the_right_key_is_taken_and_operations_need_none(locked_url):
    headers = {"Authorization": "Bearer söcret".encode()}
    assert httpx.get(f"{locked_url}/v1/models", headers=headers).status_code == 200
    assert [httpx.get(locked_url + path).status_code for path in OPEN] == [200] * 5


def test_a_wrong_key_is_the_openai_clients_own_exception(locked_url):
    with openai.OpenAI(base_url=f"{locked_url}/v1", api_key="wrong") as client, \
            pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_while_the_frontend_starts_the_app_is_live_and_not_ready_and_requests_wait(frontend):
    gate, starts = threading.Event(), []

    async def get_frontend():
        starts.append(1)
        while not gate.is_set():
            await asyncio.sleep(0.01)
        return frontend

    with fake.running(frontend, get_frontend) as url:
        assert httpx.get(f"{url}/health/live").status_code == 200
        response = httpx.get(f"{url}/health/ready")
        assert (response.status_code, response.json()["reason"]) == (503, "the frontend is starting")
        assert len(starts) == 1
        gate.set()
        assert httpx.get(f"{url}/v1/models").status_code == 200
        assert httpx.get(f"{url}/health/ready").status_code == 200


def test_a_frontend_that_cannot_start_says_why_and_is_tried_again(frontend):
    failures = [UnavailableError("no Head"), ValueError("secret"), UnavailableError("no Head")]

    async def get_frontend():
        if failures:
            raise failures.pop(0)
        return frontend

    with fake.running(frontend, get_frontend) as url:
        assert httpx.get(f"{url}/health/ready").json()["reason"] == "no Head"
        assert "secret" not in httpx.get(f"{url}/health/ready").text
        assert httpx.get(f"{url}/v1/models").status_code == 503
        assert httpx.get(f"{url}/v1/models").status_code == 200
