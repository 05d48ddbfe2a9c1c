"""What a killed rank and a SIGTERM do to those who are being served."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import httpx
import psutil
import pytest

LONG = {"prompt": "Hello", "max_tokens": 900, "ignore_eos": True, "temperature": 0}


class Caller(threading.Thread):
    """One request and how it ended."""

    def __init__(self, url: str, *, stream: bool, **body: Any) -> None:
        super().__init__()
        self.url, self.stream, self.body = url, stream, {**LONG, **body}
        self.status = self.ended_s = self.last_line = None
        self.begun = threading.Event()

    def run(self) -> None:
        with httpx.stream(
            "POST", f"{self.url}/v1/completions", json={**self.body, "stream": self.stream}, timeout=120) as response:
            self.status = response.status_code
            for line in response.iter_lines():
                self.begun.set()
                self.last_line = line or self.last_line
        self.ended_s = time.monotonic()


@pytest.mark.slow
def test_a_killed_rank_ends_its_requests_and_the_server_serves_again(start_server: Any) -> None:
    flags = ("--dtype", "float32", "--tensor-parallel-size", "2", "--max-model-len", "1024", "--num-blocks", "400")
    with start_server(*flags) as server:
        streams = [Caller(server.url, stream=True) for _ in range(4)]
        others = [Caller(server.url, stream=False) for _ in range(2)]
        for caller in [*streams, *others]:
            caller.start()
        for caller in streams:
            assert caller.begun.wait(60)
        ranks = server.rank_processes()
        assert len(ranks) == 2
        killed_s = time.monotonic()
        ranks[-1].kill()
        for caller in [*streams, *others]:
            caller.join(30)
            assert not caller.is_alive(), "a request hangs"
            assert caller.ended_s - killed_s < 3
        assert all("unavailable" in caller.last_line for caller in streams)
        assert all(caller.status == 503 for caller in others)
        assert httpx.get(f"{server.url}/health/live", timeout=10).status_code == 200
        server.wait_until_ready()
        answer = httpx.post(
            f"{server.url}/v1/completions", timeout=60,
            json={"prompt": "The capital of France is", "max_tokens": 4, "temperature": 0})
        assert "Paris" in answer.json()["choices"][0]["text"]
        assert server.status()["epoch"] == 2
        # The survivor of the old group is gone too.
        assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in ranks)
        assert len(server.rank_processes()) == 2


@pytest.mark.slow
def test_sigterm_lets_running_requests_finish_and_leaves_nothing_behind(start_server: Any) -> None:
    with start_server("--dtype", "float32", "--max-model-len", "1024", "--num-blocks", "400") as server:
        caller = Caller(server.url, stream=True, max_tokens=60)
        caller.start()
        assert caller.begun.wait(60)
        family = server.descendants()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.7)
        if caller.is_alive():
            refused = httpx.post(f"{server.url}/v1/completions", json={"prompt": "Hi", "max_tokens": 2}, timeout=10)
            assert refused.status_code == 503
            assert httpx.get(f"{server.url}/health/ready", timeout=10).status_code == 503
        caller.join(60)
        assert caller.last_line == "data: [DONE]"
        assert server.process.wait(60) == 0
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive, [process.cmdline() for process in alive]
