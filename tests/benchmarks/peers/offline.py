"""A model in a process of its own that generates what it is asked to: the parent's side of `child.py`."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from peers.pss import tree

from kvarto.cluster.cli.bench.trace import TraceRequest

HERE = Path(__file__).parent
END_S = 20
LOG_END = 2000


class OfflineProcess:
    """`program` (a file of this folder) under the interpreter `python`; loaded once constructed, and stopped (SIGSTOP)
    except while it generates, so that it cannot disturb what is measured meanwhile.

    Raises `RuntimeError` with the end of its log when it ends.
    """

    def __init__(self, python: str, program: str, model: str, options: Mapping[str, Any],
                 environment: Mapping[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # as long as the process
        self._process = subprocess.Popen(
            [python, str(HERE / program), model, json.dumps(options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, text=True, env=None if environment is None else dict(environment))
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def generate(self, requests: Sequence[TraceRequest]) -> float:
        """Seconds that the requests take, submitted at once. Every token asked for must have come."""
        self._resume()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({
            "prompts": [request.prompt for request in requests],
            "output_lens": [request.output_len for request in requests]}) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        self._suspend()
        wanted = sum(request.output_len for request in requests)
        if answer["tokens"] != wanted:
            raise RuntimeError(f"{answer['tokens']} tokens were generated, {wanted} were asked for")
        return float(answer["seconds"])

    def close(self) -> None:
        """End it and its children. Idempotent."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._resume()
            family = tree(self.pid)
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_S)
            for process in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.wait()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self._process.args[:3]} ended without an answer:\n{self._log.read()[-LOG_END:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _suspend(self) -> None:
        for process in tree(self.pid):
            process.suspend()

    def _resume(self) -> None:
        for process in tree(self.pid):
            process.resume()
