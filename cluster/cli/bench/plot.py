"""Plots of benchmarks, with matplotlib, which is not one of kvarto's own needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ....protos.errors import ConfigError

SUFFIXES = (".svg", ".png")


def check_plot(path: Path) -> None:
    """What can be refused before anything is measured. Raises `ConfigError`."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot takes a file that ends with {' or '.join(SUFFIXES)}, got {path}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot: there is no folder {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'kvarto[plot]'") from None


def plot_sweep(points: list[dict[str, Any]], path: Path, title: str) -> None:
    """Normalized latency and throughput over the request rate (PagedAttention, figure 12). `points` are summaries with
    a `rate`; those in which no request ended well are left out."""
    from matplotlib.figure import Figure

    seen = [point for point in points if point["normalized_latency_ms"] is not None]
    rates = [point["rate"] for point in seen]
    figure = Figure(figsize=(9, 4), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    latency.plot(rates, [point["normalized_latency_ms"] / 1e3 for point in seen], marker="o")
    latency.set(ylabel="normalized latency, s per output token", yscale="log")
    for formatter in (latency.yaxis.set_major_formatter, latency.yaxis.set_minor_formatter):
        formatter("{x:g}")
    throughput.plot(rates, [point["out_tok_per_s"] for point in seen], marker="o")
    throughput.set(ylabel="output tokens per second", ylim=(0, None))
    for axes in (latency, throughput):
        axes.set(xlabel="request rate, requests per second")
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path)
