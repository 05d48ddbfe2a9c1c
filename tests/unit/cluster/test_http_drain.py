"""`POST /drain`: who may, and what `kvarto drain` makes of the answers."""

from __future__ import annotations

import importlib.util
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
from starlette.requests import Request
from typer.testing import CliRunner

from kvarto.cluster.cli.app import app
from kvarto.cluster.http.drain import check_may_drain
from kvarto.protos.errors import PermissionDeniedError, UnavailableError

_spec = importlib.util.spec_from_file_location("http_fake", Path(__file__).with_name("http_fake.py"))
assert _spec and _spec.loader
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)

REQUEST = {"model": fake.MODEL, "prompt": "Hi", "max_tokens": 40}


@pytest.fixture
def serve():
    """A server of a frontend with these options: (frontend, URL)."""
    stack = []

    def serve(delay_s=0.0, **options):
        frontend = fake.FakeFrontend(fake.make_config(**options), delay_s=delay_s)
        context = fake.running(frontend)
        stack.append(context)
        return frontend, context.__enter__()

    yield serve
    for context in stack:
        context.__exit__(None, None, None)


@pytest.fixture
def run(monkeypatch):
    """`kvarto drain` with these arguments."""
    monkeypatch.delenv("KVARTO_API_KEY", raising=False)
    return lambda *args, **env: CliRunner().invoke(app, ["drain", *args], env=env)


def request_of(host, **headers):
    names = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "path": "/drain", "headers": names,
                    "client": None if host is None else (host, 1)})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"])
def test_this_machine_may_drain(host):
    check_may_drain(request_of(host), None)


@pytest.mark.parametrize("host", ["10.0.0.7", "::ffff:10.0.0.7", "fe80::1", "0.0.0.0", "testclient", "", None])
def test_nobody_else_may_even_with_the_key(host):
    with pytest.raises(PermissionDeniedError):
        check_may_drain(request_of(host, authorization="Bearer key"), "key")


@pytest.mark.parametrize("name", ["x_forwarded_for", "forwarded", "x_real_ip", "via", "origin"])
def test_neither_may_a_proxy_for_somebody_nor_a_web_page(name):
    with pytest.raises(PermissionDeniedError):
        check_may_drain(request_of("127.0.0.1", **{name: "127.0.0.1"}), None)


def test_a_refusal_is_openais_own_and_drains_nothing(serve):
    frontend, url = serve()
    with openai.OpenAI(base_url=url, api_key="x", default_headers={"X-Forwarded-For": "10.0.0.7"}) as client, \
            pytest.raises(openai.PermissionDeniedError) as refusal:
        client.post("/drain", cast_to=object)
    assert refusal.value.code == "permission_denied"
    assert frontend.state.ready


def test_only_a_post_drains(serve):
    frontend, url = serve()
    assert httpx.get(f"{url}/drain").status_code == 405
    assert frontend.state.ready


def test_on_this_machine_too_the_key_is_needed(serve, run):
    frontend, url = serve(api_key="key")
    assert httpx.post(f"{url}/drain").status_code == 401
    assert run("--url", url).exit_code == 1
    assert run("--url", url, KVARTO_API_KEY="wrong").exit_code == 1
    assert frontend.state.ready
    assert run("--url", url, KVARTO_API_KEY="key").exit_code == 0
    assert not frontend.state.ready


def test_the_command_returns_when_what_runs_has_ended_and_readiness_has_gone_at_once(serve, run):
    frontend, url = serve(delay_s=0.05)
    answers = []
    caller = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=REQUEST, timeout=30)))
    caller.start()
    fake.wait_until(lambda: frontend.running)
    seen = []
    watcher = threading.Thread(
        target=lambda: (fake.wait_until(lambda: not frontend.state.ready),
                        seen.append((httpx.get(f"{url}/health/ready").status_code, len(frontend.running)))))
    watcher.start()
    result = run("--url", url, "--timeout", "20")
    assert not frontend.running
    assert (result.exit_code, result.output) == (0, "draining: 1 requests are left\nall requests have finished\n")
    for thread in (caller, watcher):
        thread.join(10)
    assert answers[0].status_code == 200
    assert seen == [(503, 1)]


def test_what_is_left_after_the_timeout_is_a_failure(serve, run):
    frontend, url = serve()
    frontend.running.add("one that hangs")
    result = run("--url", url, "--timeout", "0.3")
    assert result.exit_code == 1
    assert "error: 1 requests did not finish within 0.3 s" in result.output


def test_the_delay_is_served(serve, run):
    frontend, url = serve()
    begun, ready = time.monotonic(), []
    watcher = threading.Timer(0.3, lambda: ready.append(frontend.state.ready))
    watcher.start()
    assert run("--url", url, "--delay", "0.8").exit_code == 0
    watcher.join()
    assert time.monotonic() - begun >= 0.8
    assert ready == [True]


def test_where_nobody_listens_there_is_nothing_to_drain(run):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        result = run("--url", f"http://127.0.0.1:{probe.getsockname()[1]}")
    assert result.exit_code == 0
    assert result.output.startswith("nothing to drain: no server answers at http://127.0.0.1:")


def test_a_frontend_that_is_starting_has_nothing_to_drain(serve, run):
    async def starting():
        raise UnavailableError("no Head yet")

    with fake.running(None, starting, fake.make_config()) as url:
        result = run("--url", url)
    assert (result.exit_code, result.output) == (0, "nothing to drain: no Head yet\n")


@pytest.mark.parametrize("option", ["--delay", "--timeout"])
def test_a_time_before_now_is_refused(run, option):
    result = run(option, "-1")
    assert result.exit_code == 2
    assert option in result.output


def test_a_worker_drains_its_node_until_nothing_is_left(run, monkeypatch):
    left = [2, 1, 0]
    fake_application = SimpleNamespace(drain_this_node=lambda: left.pop(0))
    monkeypatch.setitem(sys.modules, "kvarto.cluster.application", fake_application)
    result = run("--worker")
    assert (result.exit_code, result.output) == (0, "draining: 2 requests are left\nall requests have finished\n")
    assert left == []


def test_a_worker_whose_application_has_ended_may_end_too(run, monkeypatch):
    def gone():
        raise UnavailableError("no Ray cluster at auto")

    monkeypatch.setitem(sys.modules, "kvarto.cluster.application", SimpleNamespace(drain_this_node=gone))
    assert run("--worker").output == "nothing to drain: no Ray cluster at auto\n"
