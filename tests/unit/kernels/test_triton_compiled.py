"""Every kernel variant compiles for every target, ahead of time and without a device; what it needs is in the docs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from kvarto.kernels.triton.variants import variants

MOST_PARAMETERS = 20
ROOT = Path(__file__).parents[3]
Table = dict[str, dict[str, str]]


@pytest.fixture(scope="module")
def compiled() -> dict[str, object]:
    """Made outside the interpreter, in which this process may be."""
    command = [sys.executable, "-m", "kvarto.kernels.triton.resources", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def table(compiled: dict[str, Table]) -> Table:
    return compiled["table"]


def spilled_bytes(cell: str) -> int:
    return int(cell.split(" / ")[1])


def test_no_kernel_takes_more_parameters_than_one_can_read() -> None:
    counts = {variant.kernel.__name__: len(variant.signature) for variant in variants("cuda-90")}
    assert {name: count for name, count in counts.items() if count > MOST_PARAMETERS} == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_variant_compiles_for_every_target(table: Table) -> None:
    assert {kernel.split()[0] for kernel in table} == {
        "decode", "reduce", "prefill", "write_kv", "quantize_blocks", "copy_blocks", "score_sums", "receive",
        "compact_rows"}
    assert all(set(row) == {"cuda-80", "cuda-90", "cuda-100", "hip-gfx942"} for row in table.values())


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda-80", "cuda-90", "cuda-100", "hip-gfx942"])
def test_decode_and_sparsity_spill_no_register(table: Table, target: str) -> None:
    kernels = ("decode", "reduce", "score_sums", "receive", "compact_rows")
    spilling = {name: row[target] for name, row in table.items()
                if name.startswith(kernels) and spilled_bytes(row[target])}
    assert spilling == {}


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_this_code_compiles_to(compiled: dict[str, object], table: Table) -> None:
    text = (ROOT / "docs" / "kernels.md").read_text()
    documented = re.search(r"Compiled by Triton ([\d.]+\d)", text)
    assert documented
    if documented[1] != compiled["triton"]:
        pytest.skip(f"the docs are of Triton {documented[1]}, this is {compiled['triton']}")
    for name, row in table.items():
        assert f"| {name} | {' | '.join(row.values())} |" in text, "run kvarto.kernels.triton.resources --write"
