"""Arrivals, and what outcomes add up to."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kvarto.cluster.cli.bench.arrivals import check_rate, poisson_arrivals
from kvarto.cluster.cli.bench.outcome import Outcome
from kvarto.cluster.cli.bench.summary import Slo, itl_samples, percentile, summarize
from kvarto.cluster.cli.bench.trace import TraceRequest, rotated
from kvarto.protos.errors import ConfigError


def outcome(arrived, *arrivals, error=None):
    return Outcome(arrived, list(arrivals), error)


def test_arrivals_are_a_poisson_process_of_the_rate():
    gaps = np.diff(poisson_arrivals(4.0, 20_001, seed=1))
    # Of an exponential distribution the mean and the deviation are both 1 / rate; 5 standard errors of 20,000 gaps.
    assert gaps.mean() == pytest.approx(0.25, rel=5 / math.sqrt(20_000))
    assert gaps.std() == pytest.approx(0.25, rel=10 / math.sqrt(20_000))
    assert np.quantile(gaps, 0.5) == pytest.approx(0.25 * math.log(2), rel=0.05)


def test_a_seed_repeats_the_arrivals_and_a_rate_scales_them():
    slow, fast = poisson_arrivals(1.0, 9, seed=3), poisson_arrivals(8.0, 9, seed=3)
    assert poisson_arrivals(1.0, 9, seed=3) == slow != poisson_arrivals(1.0, 9, seed=4)
    assert [8 * time for time in fast] == pytest.approx(slow)
    assert slow[0] == 0


def test_an_infinite_rate_is_all_at_once():
    assert poisson_arrivals(math.inf, 3, seed=0) == [0, 0, 0]


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan, -math.inf])
def test_a_rate_that_is_none_is_refused(rate):
    with pytest.raises(ConfigError, match="above 0"):
        check_rate(rate)


@pytest.mark.parametrize("percent", [1, 50, 90, 99, 100])
def test_percentiles_are_those_of_the_samples_repeated_by_weight(percent):
    rng = np.random.default_rng(0)
    values, weights = rng.random(300), rng.integers(1, 9, 300)
    expected = np.percentile(np.repeat(values, weights), percent, method="inverted_cdf")
    assert percentile(zip(values, weights.tolist(), strict=True), percent) == expected


def test_there_is_no_percentile_of_nothing():
    assert percentile([], 99) is None


def test_a_piece_of_several_tokens_counts_as_so_many_of_equal_latency():
    seen = outcome(0.0, (1.0, 1), (1.5, 2), (2.5, 6))
    assert itl_samples([seen]) == [(0.5, 1), (0.25, 4)]
    assert seen.mean_itl == pytest.approx(1.5 / 5)
    assert seen.ttft == 1.0
    assert seen.normalized_latency == pytest.approx(2.5 / 6)


def test_the_servers_total_overrules_a_count_by_pieces():
    too_many = outcome(0.0, (1.0, 1), (2.0, 2), (3.0, 3))
    too_many.end_with(2)
    assert too_many.arrivals == [(1.0, 1), (2.0, 2)]
    too_few = outcome(0.0, (1.0, 1), (2.0, 2))
    too_few.end_with(5)
    assert too_few.arrivals == [(1.0, 1), (2.0, 5)]


def test_a_summary_counts_tokens_over_the_time_to_the_last_of_them():
    report = summarize([outcome(0.0, (0.5, 1), (1.0, 6)), outcome(1.0, (1.25, 1), (4.0, 12))], Slo())
    assert (report["out_tok"], report["seconds"], report["out_tok_per_s"]) == (18, 4.0, 4.5)
    assert (report["ttft_p50_ms"], report["ttft_p99_ms"]) == (250, 500)
    assert (report["itl_p50_ms"], report["itl_p99_ms"], report["longest_gap_ms"]) == (250, 250, 2750)
    assert report["normalized_latency_ms"] == pytest.approx(1e3 * (1 / 6 + 3 / 12) / 2, abs=0.001)
    assert report["slo_attainment"] is None


@pytest.mark.parametrize(("slo", "share"), [
    (Slo(ttft_ms=500), 0.5), (Slo(ttft_ms=499), 0.25), (Slo(itl_ms=100), 0.5), (Slo(ttft_ms=500, itl_ms=100), 0.25)])
def test_attainment_is_the_share_of_all_requests_within_both_bounds(slo, share):
    outcomes = [
        outcome(0.0, (0.25, 1), (0.34375, 2)),  # 250 ms, 93.75 ms
        outcome(0.0, (0.5, 1), (0.7, 2)),  # 500 ms, 200 ms
        outcome(0.0, (1.0, 1), (1.0625, 2)),  # 1000 ms, 62.5 ms
        outcome(0.0, error="503: no"),
    ]
    assert summarize(outcomes, slo)["slo_attainment"] == share


def test_failures_are_named_and_counted_and_have_no_latency():
    report = summarize([outcome(0.0, error="503: no"), outcome(0.0, (9.0, 1), error="broke off"),
                        outcome(0.0, error="503: no"), outcome(0.0, (1.0, 4))], Slo())
    assert (report["num_requests"], report["num_failed"]) == (4, 3)
    assert report["failures"] == {"503: no": 2, "broke off": 1}
    assert (report["out_tok"], report["ttft_p99_ms"]) == (4, 1000)


def test_a_run_without_a_good_request_has_no_latencies():
    report = summarize([outcome(0.0, error="503: no")], Slo(ttft_ms=1))
    assert report["ttft_p50_ms"] is report["itl_p99_ms"] is report["normalized_latency_ms"] is None
    assert (report["out_tok_per_s"], report["slo_attainment"]) == (0, 0)


def test_rotated_prompts_are_as_long_and_begin_otherwise():
    requests = [TraceRequest([1, 2, 3], 5), TraceRequest([4], 6)]
    assert rotated(requests, 4) == [TraceRequest([2, 3, 1], 5), TraceRequest([4], 6)]
