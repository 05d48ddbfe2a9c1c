"""What is compared: kvarto, its peers and the machine's limits, each asked for the same figures.

A figure that a side can give is a method of it, which takes the number of the round and returns values by name.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from limits import PREFILL_LEN
from peers.offline import OfflineProcess
from peers.pss import PeakPss
from peers.servers import Serving

from kvarto.cluster.cli.bench.trace import TraceRequest, read_trace

Values = dict[str, float]
STREAM_LEN = 128
ONLINE_REQUESTS = 128
ONLINE_SHARE = 0.6


def prompt_of(trace: Sequence[TraceRequest], length: int, round_number: int) -> list[int]:
    """A prompt of exactly `length` tokens of real text, another one every round, so that no cache helps."""
    text = [token_id for request in trace for token_id in request.prompt]
    begin = round_number * length % (len(text) - length)
    return text[begin: begin + length]


class Side:
    """Sides are closed when no further figure needs them."""

    def close(self) -> None:
        """End what was started. Idempotent."""


class Offline(Side):
    """A model in a process that `start` makes when it is first asked for something. `pool_bytes`: resident bytes of the
    KV pool, given the process's id. `num_requests`: only so many of a trace, where all would take too long. `keep`:
    whether it stays, standing still, until it is asked again."""

    def __init__(self, start: Callable[[], OfflineProcess], pool_bytes: Callable[[int], int] | None = None,
                 num_requests: int | None = None, keep: bool = True) -> None:
        self._start = start
        self._keep = keep
        self._num_requests = num_requests
        self._pool_bytes = pool_bytes
        self._running: OfflineProcess | None = None

    def trace(self, path: Path, _: int) -> Values:
        requests = read_trace(path)[:self._num_requests]
        seconds = self._warm().generate(requests)
        if not self._keep:
            self.close()
        return {"out_tok_per_s": sum(request.output_len for request in requests) / seconds}

    def single(self, path: Path, round_number: int) -> Values:
        prompt = prompt_of(read_trace(path), STREAM_LEN, round_number)
        running = self._warm()
        first = running.generate([TraceRequest(prompt, 1)])
        seconds = running.generate([TraceRequest(prompt, STREAM_LEN)])
        return {"out_tok_per_s": STREAM_LEN / seconds, "decode_step_ms": 1e3 * (seconds - first) / (STREAM_LEN - 1)}

    def prefill(self, path: Path, round_number: int) -> Values:
        prompt = prompt_of(read_trace(path), PREFILL_LEN, round_number)
        return {"prefill_ms": 1e3 * self._warm().generate([TraceRequest(prompt, 1)])}

    def start(self, path: Path, _: int) -> Values:
        """From nothing to a first token: interpreter, imports, weights, warm-up of its own, one short prompt."""
        self.close()
        began = time.perf_counter()
        running = self._start()
        running.generate([TraceRequest(read_trace(path)[0].prompt[:8], 1)])
        seconds = time.perf_counter() - began
        running.close()
        return {"start_s": seconds}

    def memory(self, path: Path, _: int) -> Values:
        """The KV pool is left out: as far as it is resident where that can be told, and else all of it."""
        running = self._warm()
        with PeakPss(running.pid) as pss:
            running.generate(read_trace(path))
        pool = self._pool_bytes(running.pid) if self._pool_bytes else 0
        return {"pss_mb": (pss.peak - pool) / 1e6, "pool_mb": pool / 1e6}

    def close(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None

    def _warm(self) -> OfflineProcess:
        if self._running is None:
            self._running = self._start()
            self._running.generate([TraceRequest([1 + number] * 64, 16) for number in range(4)])
        return self._running


class Server(Side):
    """A server that `kvarto bench serve` loads."""

    def __init__(self, serving: Serving, *, grpc: bool = False) -> None:
        self._serving = serving
        self._flags = ["--grpc"] if grpc else []
        self.online_rate: float | None = None
        """Requests per second of `online`, set by `set_online_rate`."""

    def trace(self, path: Path, _: int) -> Values:
        return self.load(path)

    def single(self, path: Path, round_number: int) -> Values:
        prompt = prompt_of(read_trace(path), STREAM_LEN, round_number)
        with self._serving.running() as flags:
            report = bench_serve([TraceRequest(prompt, STREAM_LEN)], *flags, *self._flags, "--num-warm-up", "1")
        return {"out_tok_per_s": report["out_tok_per_s"], "decode_step_ms": report["itl_p50_ms"]}

    def online(self, path: Path, round_number: int) -> Values:
        """Poisson arrivals, others every round."""
        return self.load(path, "--rate", str(self.online_rate), "--seed", str(round_number), "--num-requests",
                         str(ONLINE_REQUESTS))

    def load(self, path: Path, *options: str) -> Values:
        """What `kvarto bench serve` prints that is a number; a failed request is an error."""
        with self._serving.running() as flags:
            return bench_serve(read_trace(path), *flags, *self._flags, *options)

    def close(self) -> None:
        self._serving.close()


class Limits(Side):
    """What the machine allows: `limits.py`, once a round and trace."""

    def __init__(self) -> None:
        self._seen: dict[tuple[Path, int], Values] = {}

    def trace(self, path: Path, round_number: int) -> Values:
        if (path, round_number) not in self._seen:
            command = [sys.executable, str(Path(__file__).parents[1] / "limits.py"), str(path)]
            ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            self._seen[path, round_number] = json.loads(ended.stdout)
        return self._seen[path, round_number]

    single = prefill = trace


def set_online_rate(sides: Mapping[str, Server], path: Path, given: float | None) -> float:
    """Give all sides of a figure one rate: `given`, or `ONLINE_SHARE` of what vLLM's server does with the trace at
    once."""
    rate = given
    if rate is None:
        report = sides["vllm_http"].load(path)
        rate = ONLINE_SHARE * report["num_requests"] / report["seconds"]
    for side in sides.values():
        side.online_rate = rate
    return rate


def bench_serve(requests: Sequence[TraceRequest], *options: str) -> Values:
    """The numbers in the JSON line of `kvarto bench serve`, run in a process of its own. Raises `RuntimeError` with
    what it said when a request failed."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as trace:
        json.dump([dataclasses.asdict(request) for request in requests], trace)
        trace.flush()
        command = [sys.executable, "-m", "kvarto", "bench", "serve", "--trace", trace.name, *options]
        ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{ended.stderr}")
    report = json.loads(ended.stdout)
    return {name: value for name, value in report.items() if isinstance(value, int | float)}
