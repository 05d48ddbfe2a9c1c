"""Spans reach those who listen, nested and on their own thread."""

from __future__ import annotations

import json
import threading

import pytest

from kvarto.cluster.cli.bench.profile import BESIDE, Profile
from kvarto.protos.spans import Span, heard, listen, tell


class Sink:
    def __init__(self):
        self.heard = []

    def begin(self, name, at_ns):
        self.heard.append(name)
        self.last_ns = at_ns

    def end(self, at_ns):
        assert at_ns >= self.last_ns
        self.heard.append("/")


def test_spans_begin_and_end_inside_each_other():
    sink = Sink()
    stop = listen(sink)
    with Span("a"):
        with Span("b"):
            tell("c", 1, 2)
            sink.last_ns = 0
        with Span("d"):
            pass
    stop()
    assert sink.heard == ["a", "b", "c", "/", "/", "d", "/", "/"]


def test_a_span_ends_when_what_it_measures_raises():
    sink = Sink()
    stop = listen(sink)
    with pytest.raises(KeyError), Span("a"):
        raise KeyError
    stop()
    assert sink.heard == ["a", "/"]


def test_nobody_hears_of_half_a_span():
    sink = Sink()
    with Span("a"):
        stop = listen(sink)
        with Span("b"):
            stop()
    assert sink.heard == ["b", "/"]
    assert not heard()


def test_shares_leave_out_what_is_inside_and_add_up():
    profile = Profile()
    ms = 1_000_000

    def span(name, begin, end, inside=lambda: None):
        profile.begin(name, begin * ms)
        inside()
        profile.end(end * ms)

    span("schedule", 0, 10)
    span("forward", 10, 60, lambda: (span("linear", 10, 40), span("attention", 40, 55)))
    span("sample", 60, 80, lambda: span("logits", 60, 75))
    frontend = threading.Thread(target=lambda: span("detokenize", 0, 7))
    frontend.start()
    frontend.join()
    shares = profile.shares(0.1)
    assert {part: share for part, share in shares.items() if share} == {
        "scheduling": 0.1, "GEMM": 0.45, "attention": 0.15, "other ops": 0.05, "sampling": 0.05, "rest": 0.2,
        BESIDE: 0.07}


def test_a_chrome_trace_has_every_span_with_its_thread(tmp_path):
    with Profile() as profile, Span("forward"), Span("attention"):
        pass
    profile.write_chrome_trace(tmp_path / "trace.json")
    inner, outer = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [inner["name"], outer["name"]] == ["attention", "forward"]
    assert outer["ts"] <= inner["ts"]
    assert inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 0.001
    assert inner["ph"] == "X"
    assert inner["tid"] == threading.get_ident()
