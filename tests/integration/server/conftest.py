"""A real `kvarto serve` in a process of its own, on free ports of 127.0.0.1, ended by pid."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

START_S = 180


def free_port() -> int:
    """Below the range that the kernel hands out: Ray's own processes would take one of those before the server does."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port from 20000 to 31999")


@dataclass
class Server:
    """`kvarto serve smollm2-135m` with `flags`; `url` answers once it is ready."""

    flags: list[str]
    log: Path
    port: int = field(default_factory=free_port)
    grpc_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "kvarto", "serve", "smollm2-135m", "--port", str(self.port), "--grpc-port",
                   str(self.grpc_port), *self.flags]
        self.process = subprocess.Popen(command, stdout=self.log.open("w"), stderr=subprocess.STDOUT)
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health/ready", timeout=2).status_code == 200:
                    return
            time.sleep(0.2)
        raise TimeoutError(self.log.read_text())

    def rank_processes(self) -> list[psutil.Process]:
        return [p for p in self.descendants() if "RankActor" in " ".join(p.cmdline() or [p.name()])]

    def descendants(self) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.cmdline()
                found.append(process)
        return found

    def status(self) -> dict[str, Any]:
        return httpx.get(f"{self.url}/v1/status", timeout=10).json()["groups"]["0"]

    def wait_until_idle(self, timeout_s: float) -> dict[str, Any]:
        """The status once every block is free or cached again; fails when that takes longer than `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while True:
            status = self.status()
            blocks = status["blocks"]
            if blocks["free"] + blocks["cached"] == blocks["total"]:
                return status
            assert time.monotonic() < deadline, f"blocks leaked: {status}"
            time.sleep(0.05)

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=90)


@contextlib.contextmanager
def running(log: Path, *flags: str) -> Iterator[Server]:
    server = Server(list(flags), log)
    try:
        server.start()
        yield server
    finally:
        if server.process is not None and server.process.poll() is None:
            left = server.descendants()
            try:
                server.end()
            finally:
                for process in left:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two ranks, a pool that holds about 6,000 tokens, the block space checked after every step; more flags as the
    parameter."""
    log = tmp_path_factory.mktemp("server") / "log"
    more = getattr(request, "param", ())
    with running(log, "--dtype", "float32", "--tensor-parallel-size", "2", "--max-model-len", "1024", "--num-blocks",
                 "400", "--check-integrity", "--served-model-name", "smollm2", *more) as server:
        yield server


@pytest.fixture
def start_server(tmp_path: Path) -> Any:
    """A server of one test's own: `with start_server(*flags) as server`."""
    return lambda *flags: running(tmp_path / "log", *flags)
