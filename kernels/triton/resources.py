"""The table of what the compiled kernels need: `python -m kvarto.kernels.triton.resources [--write docs/kernels.md]`.

It needs Triton and no GPU, and takes minutes when Triton's cache is empty.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import triton

from .compiled import Resources, resources_of
from .variants import TARGETS, variants

BEGIN, END = "<!-- resources: begin -->", "<!-- resources: end -->"

Table = dict[str, dict[str, Resources]]
"""Variant -> target -> what it needs there."""


def compile_all(targets: list[str]) -> Table:
    """Every variant for every one of the targets."""
    table: Table = {}
    for target in targets:
        for variant in variants(target):
            table.setdefault(variant.name, {})[target] = resources_of(variant, target)
    return table


def markdown(table: Table) -> str:
    """One row per variant; a cell holds registers / spilled bytes / bytes of shared memory."""
    targets = list(TARGETS)
    moved = {variant.name: variant.moved_per_needed for variant in variants(targets[1])}
    lines = [f"Compiled by Triton {triton.__version__}.", "",
             f"| kernel | {' | '.join(targets)} | bytes moved / needed |", "| --- " * (len(targets) + 2) + "|"]
    lines += [f"| {name} | {' | '.join(row[target].text for target in targets)} | {moved[name]:.3f} |"
              for name, row in table.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", action="append", choices=list(TARGETS), help="may be repeated; default: all")
    parser.add_argument("--json", action="store_true", help="print variant -> target -> cell of the table")
    parser.add_argument("--write", type=Path, help="put the table of all targets into this file, between its marks")
    arguments = parser.parse_args()
    if arguments.json:
        table = compile_all(arguments.target or list(TARGETS))
        print(json.dumps({"triton": triton.__version__, "table": {
            name: {target: cell.text for target, cell in row.items()} for name, row in table.items()}}))
        return
    text = markdown(compile_all(list(TARGETS)))
    if arguments.write is None:
        print(text)
        return
    before, rest = arguments.write.read_text().split(BEGIN)
    arguments.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
