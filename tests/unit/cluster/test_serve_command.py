"""`kvarto serve` and the end of an application, with Ray replaced by fakes."""

from __future__ import annotations

import asyncio
import socket
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from kvarto.cluster import application
from kvarto.cluster.cli import serve as command
from kvarto.protos.config import ServeConfig
from kvarto.protos.errors import ResourcesError, UnavailableError


@pytest.fixture
def calls(monkeypatch):
    """What would have been done to Ray, in order."""
    calls = []
    monkeypatch.setattr(command, "load_model_config", lambda _: None)
    monkeypatch.setattr(command, "resolve", lambda *_, **__: None)
    monkeypatch.setattr(command, "start_ray", lambda _: False)
    monkeypatch.setattr(command.signal, "signal", lambda *_: None)
    monkeypatch.setattr(command, "serve", SimpleNamespace(
        shutdown=lambda: calls.append("serve.shutdown"), delete=lambda name: calls.append(f"serve.delete {name}")))
    return calls


def test_a_second_server_is_refused(calls, monkeypatch):
    monkeypatch.setattr(command, "find_head", lambda _: object())
    with pytest.raises(ResourcesError, match="already runs"):
        command.run_serve(ServeConfig(model="m", port=0, grpc_port=None), "auto")


def test_a_second_server_that_is_refused_does_not_end_the_first(calls, monkeypatch):
    monkeypatch.setattr(command, "find_head", lambda _: object())
    with pytest.raises(ResourcesError):
        command.run_serve(ServeConfig(model="m", port=0, grpc_port=None), "auto")
    assert calls == []


def test_a_port_that_is_taken_is_refused_by_name():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with pytest.raises(ResourcesError) as caught:
            command.claim_port("127.0.0.1", holder.getsockname()[1], "grpc_port")
    assert caught.value.param == "grpc_port"


def test_any_free_port_is_found():
    assert command.claim_port("127.0.0.1", 0, "port") > 0


class FakeHead:
    """A Head whose `stop` ends as `outcome` says; None: never."""

    def __init__(self, outcome):
        future = Future()
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        elif outcome is not None:
            future.set_result(None)
        self.stop = SimpleNamespace(remote=lambda: SimpleNamespace(future=lambda: future))


@pytest.mark.parametrize("outcome", ["stopped", None, ConnectionError("the actor died")], ids=["well", "hung", "dead"])
def test_head_and_ranks_are_killed_however_its_stop_goes(monkeypatch, outcome):
    killed = []
    monkeypatch.setattr(application, "STOP_S", 0.05)
    monkeypatch.setattr(application.ray, "kill", lambda head, no_restart: killed.append(head))
    monkeypatch.setattr(application, "end_ranks_of", killed.append)
    head = FakeHead(outcome)
    asyncio.run(application.end_application("app", head))
    assert killed == [head, "app"]


@pytest.mark.parametrize("given", ["address", "environment"])
def test_a_ray_cluster_that_does_not_listen_is_refused_at_once(monkeypatch, given):
    """Ray itself would try for two minutes, which a pod that ends does not have."""
    monkeypatch.setattr(application.ray, "init", lambda **_: pytest.fail("Ray was asked"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ResourcesError, match=f"no Ray cluster at {address}: .*refused"):
            application.start_ray(address if given == "address" else "auto")


def test_without_a_ray_cluster_a_node_has_nothing_to_drain(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(UnavailableError, match=r"no Ray cluster at 127\.0\.0\.1:1"):
        application.drain_this_node()
