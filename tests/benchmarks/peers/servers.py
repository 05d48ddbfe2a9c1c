"""Servers that are compared, each loaded by `kvarto bench serve`.

vLLM's and llama.cpp's are started once and stopped (SIGSTOP) while others are measured. The parts of kvarto's watch
each other's clocks, so that one is started for every measurement.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Protocol

import httpx
import psutil
from peers.pss import tree

from kvarto.cluster.cli.server_process import ServerProcess, free_port

START_S = 600
POLL_S = 0.5
END_S = 60
LOG_END = 2000


class Serving(Protocol):
    """A server that can be loaded."""

    def running(self) -> contextlib.AbstractContextManager[list[str]]:
        """While the context is open the server runs; the options of `kvarto bench serve` that name it."""

    def close(self) -> None:
        """End it. Idempotent."""


class KvartoServer:
    """`kvarto serve` with `arguments`."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = arguments

    @contextlib.contextmanager
    def running(self) -> Iterator[list[str]]:
        with ServerProcess(self._arguments) as server:
            yield ["--url", server.url, "--grpc-port", str(server.grpc_port)]

    def close(self) -> None:
        """Nothing outlives `running`."""


class PeerServer:
    """`command`, to which `--host` and `--port` are added, started when it is first needed."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        self._url = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[list[str]]:
        """Raises `RuntimeError` with the end of its log when it does not come up."""
        if self._process is None:
            self._start()
        else:
            for process in tree(self._process.pid):
                process.resume()
        try:
            yield ["--url", self._url]
        finally:
            assert self._process is not None
            for process in tree(self._process.pid):
                process.suspend()

    def close(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            family = tree(self._process.pid)
            for process in family:
                process.resume()
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait()
        self._process = None

    def _start(self) -> None:
        port = free_port()
        self._url = f"http://127.0.0.1:{port}"
        self._process = subprocess.Popen(
            [*self._command, "--host", "127.0.0.1", "--port", str(port)], stdout=self._log, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, text=True, env=None if self._environment is None else dict(self._environment))
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{self._command[0]} did not come up:\n{_end_of(self._log)}")
            time.sleep(POLL_S)

    def _answers(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self._url}/v1/models", timeout=5).status_code == 200
        return False


def _end_of(log: IO[str]) -> str:
    log.seek(0)
    return log.read()[-LOG_END:]
