"""`kvarto serve` as a child of a command."""

from __future__ import annotations

import collections
import contextlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Self

from ...protos.errors import KvartoError, ResourcesError

START_S = 180.0
END_S = 90.0
POLL_S = 0.2
READER_S = 2.0
"""How long the rest of the log is waited for: an orphan of the server's could hold the pipe open for ever."""
KEPT_LINES = 20


class ServerProcess:
    """`kvarto serve` with `arguments`, on free ports of 127.0.0.1, as a context manager: ready once entered, ended on
    leaving. `on_line` is given every line of its log, in a thread of its own."""

    def __init__(self, arguments: Sequence[str], on_line: Callable[[str], None] = lambda _: None) -> None:
        self.port, self.grpc_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.arguments = [*arguments, "--host", "127.0.0.1", "--port", str(self.port), "--grpc-port",
                          str(self.grpc_port)]
        self._on_line = on_line
        self._last_lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        self._ready = threading.Event()

    def __enter__(self) -> Self:
        """Raises `KvartoError` when the server does not come up; nothing is left running then."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvarto", "serve", *self.arguments], stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL, text=True)
        self._reader = threading.Thread(target=self._read_log, daemon=True)
        self._reader.start()
        try:
            self._wait_until_ready()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Raises `KvartoError` when the server does not end well, unless another error is on its way."""
        code = self._end()
        if code and kind is None:
            raise KvartoError(f"the server ended with exit code {code}: {self._last_words()}")

    def _end(self) -> int:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._reader.join(READER_S)
        return code

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._last_lines.append(line.strip())
            self._on_line(line.rstrip())
            if line.startswith("ready after"):
                self._ready.set()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while not self._ready.wait(POLL_S):
            if self._process.poll() is not None:
                self._reader.join(READER_S)
                raise KvartoError(f"the server ended with exit code {self._process.returncode} before it was ready: "
                                  f"{self._last_words()}")
            if time.monotonic() > deadline:
                raise KvartoError(f"the server was not ready within {START_S:g} s: {self._last_words()}")

    def _last_words(self) -> str:
        return next((line for line in reversed(self._last_lines) if line), "it logged nothing")


def free_port() -> int:
    """Below the range that the kernel hands out: Ray's own processes would take one of those before the server does.
    Raises `ResourcesError`."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ResourcesError("no free port from 20000 to 31999")
