"""The figures that `compare.py` takes: who is asked for what, and the bars that the answers are held against."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Traces:
    """The requests of 64 and of 256 at once."""

    small: Path = Path(__file__).parent / "traces" / "sharegpt_like_64.json"
    large: Path = Path(__file__).parent / "traces" / "sharegpt_like_256.json"


Values = dict[str, float]
Measured = Mapping[str, list[Values]]
"""Of one figure: per side the values of every round."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table: a value of one side against that of another."""

    label: str
    value: str
    side: str
    peer: str
    bar: float | None = None
    """What the ratio must reach; None for a line without a bar."""
    at_most: bool = False
    """The ratio is to stay below the bar instead."""
    inverse: bool = False
    """The ratio is peer over side: how many times as fast, where the value is a time."""

    def ratio(self, measured: Measured) -> float | None:
        """Of the medians; None where one of the sides was not measured."""
        ours, theirs = (median(measured, side, self.value) for side in (self.side, self.peer))
        if ours is None or theirs is None:
            return None
        return theirs / ours if self.inverse else ours / theirs

    def met(self, ratio: float) -> bool | None:
        if self.bar is None:
            return None
        return ratio <= self.bar if self.at_most else ratio >= self.bar


@dataclass(frozen=True, slots=True)
class Figure:
    """Something that sides are asked for in turns."""

    title: str
    sides: tuple[str, ...]
    ask: Callable[[Any, Traces, int], Values]
    """Given a side, the traces and the number of the round."""
    rows: tuple[Row, ...]


def median(measured: Measured, side: str, value: str) -> float | None:
    """Over the rounds; None where the side was not measured."""
    rounds = measured.get(side)
    return statistics.median(values[value] for values in rounds) if rounds else None


RATE = "out_tok_per_s"
FIGURES: dict[str, Figure] = {
    "memory": Figure(
        "peak memory (PSS) without the KV pool, offline", ("kvarto", "vllm"),
        lambda side, traces, number: side.memory(traces.small, number),
        (Row("peak PSS, MB", "pss_mb", "kvarto", "vllm", 0.5, at_most=True),)),
    "trace64": Figure(
        "trace of 64 requests at once",
        ("kvarto", "vllm", "limits", "transformers", "transformers16", "llama", "kvarto_int4"),
        lambda side, traces, number: side.trace(traces.small, number),
        (Row("out tok/s", RATE, "kvarto", "vllm", 1.8), Row("out tok/s", RATE, "kvarto", "limits", 0.75),
         Row("out tok/s", RATE, "kvarto", "transformers", 35), Row("out tok/s", RATE, "kvarto", "transformers16", 13),
         Row("out tok/s", RATE, "kvarto", "llama", 12), Row("out tok/s", RATE, "kvarto_int4", "vllm"),
         Row("out tok/s", RATE, "kvarto_int4", "llama"))),
    "trace256": Figure(
        "trace of 256 requests at once", ("kvarto", "vllm", "limits", "kvarto_int4"),
        lambda side, traces, number: side.trace(traces.large, number),
        (Row("out tok/s", RATE, "kvarto", "vllm", 2.2), Row("out tok/s", RATE, "kvarto", "limits", 0.75),
         Row("out tok/s", RATE, "kvarto_int4", "vllm"))),
    "single": Figure(
        "single stream, 128 in and 128 out", ("kvarto", "vllm", "limits", "llama", "kvarto_int4"),
        lambda side, traces, number: side.single(traces.small, number),
        (Row("out tok/s", RATE, "kvarto", "vllm", 2), Row("out tok/s", RATE, "kvarto", "llama", 1.5),
         Row("decode step, ms", "decode_step_ms", "kvarto", "limits", 0.75, inverse=True),
         Row("out tok/s", RATE, "kvarto_int4", "vllm"), Row("out tok/s", RATE, "kvarto_int4", "llama"))),
    "prefill": Figure(
        "prefill of 1,024 tokens", ("kvarto", "vllm", "limits", "kvarto_int4"),
        lambda side, traces, number: side.prefill(traces.small, number),
        (Row("ms", "prefill_ms", "kvarto", "vllm", 0.7, at_most=True),
         Row("ms", "prefill_ms", "kvarto", "limits", 0.75, inverse=True),
         Row("ms", "prefill_ms", "kvarto_int4", "vllm"))),
    "tp2": Figure(
        "two ranks of one thread", ("kvarto", "kvarto_tp2"),
        lambda side, traces, number: side.trace(traces.small, number),
        (Row("out tok/s", RATE, "kvarto_tp2", "kvarto", 0.9),)),
    "http": Figure(
        "trace of 64 through HTTP, streaming", ("kvarto", "kvarto_http", "vllm", "vllm_http"),
        lambda side, traces, number: side.trace(traces.small, number),
        (Row("out tok/s", RATE, "kvarto_http", "kvarto", 0.9), Row("out tok/s", RATE, "vllm_http", "vllm"),
         Row("out tok/s", RATE, "kvarto_http", "vllm_http"))),
    "grpc": Figure(
        "trace of 64 through gRPC, streaming", ("kvarto", "kvarto_grpc"),
        lambda side, traces, number: side.trace(traces.small, number),
        (Row("out tok/s", RATE, "kvarto_grpc", "kvarto", 0.9),)),
    "online": Figure(
        "Poisson arrivals over HTTP", ("kvarto_http", "vllm_http"),
        lambda side, traces, number: side.online(traces.large, number),
        (Row("TTFT p99, ms", "ttft_p99_ms", "kvarto_http", "vllm_http", 0.6, at_most=True),
         Row("ITL p99, ms", "itl_p99_ms", "kvarto_http", "vllm_http", 0.6, at_most=True),
         Row("longest gap, ms", "longest_gap_ms", "kvarto_http", "vllm_http"))),
    "start": Figure(
        "start to first token, installed and cached", ("kvarto", "vllm"),
        lambda side, traces, number: side.start(traces.small, number),
        (Row("s", "start_s", "kvarto", "vllm", 10, inverse=True),)),
}
