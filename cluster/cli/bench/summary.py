"""What the outcomes of a run add up to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .outcome import Outcome

PERCENTS = (50, 90, 99)
MOST_FAILURES = 5
"""Kinds of failure that are named; the rest are only counted."""


@dataclass(frozen=True, slots=True)
class Slo:
    """A service level objective: upper bounds in milliseconds, None for none."""

    ttft_ms: float | None = None
    itl_ms: float | None = None

    def attained(self, outcome: Outcome) -> bool:
        """Whether a request ended well, with its TTFT and its mean ITL within the bounds."""
        return (outcome.error is None
                and (self.ttft_ms is None or 1e3 * outcome.ttft <= self.ttft_ms)
                and (self.itl_ms is None or 1e3 * outcome.mean_itl <= self.itl_ms))


def percentile(samples: Iterable[tuple[float, int]], percent: int) -> float | None:
    """The smallest value that at least `percent` % of the weight does not exceed; None without samples. A sample is a
    value and its weight, a positive integer."""
    ordered = sorted(samples)
    total, reached = sum(weight for _, weight in ordered), 0
    for value, weight in ordered:
        reached += weight
        if 100 * reached >= percent * total:
            return value
    return None


def itl_samples(outcomes: Iterable[Outcome]) -> list[tuple[float, int]]:
    """Inter-token latencies in seconds with their weights: a piece of k tokens that was waited for g seconds counts as
    k tokens of g / k seconds each, so that servers which send in larger pieces are neither favoured nor punished."""
    return [(gap / tokens, tokens) for outcome in outcomes for gap, tokens in outcome.gaps()]


def summarize(outcomes: Sequence[Outcome], slo: Slo) -> dict[str, Any]:
    """The figures of a run, for its JSON line. Failed requests count in `num_failed`, `failures` and against the SLO,
    and nowhere else."""
    good = [outcome for outcome in outcomes if outcome.error is None]
    failures = Counter(outcome.error for outcome in outcomes if outcome.error is not None)
    seconds = max((outcome.ended for outcome in good), default=0.0)
    num_out = sum(outcome.num_tokens for outcome in good)
    itl = itl_samples(good)
    longest = max((gap for outcome in good for gap, _ in outcome.gaps()), default=None)
    latency = sum(outcome.normalized_latency for outcome in good) / len(good) if good else None
    bounded = slo.ttft_ms is not None or slo.itl_ms is not None
    return {
        "num_requests": len(outcomes), "num_failed": len(outcomes) - len(good),
        "failures": dict(failures.most_common(MOST_FAILURES)),
        "seconds": round(seconds, 3), "out_tok": num_out,
        "out_tok_per_s": round(num_out / seconds, 2) if seconds else 0.0,
        **{f"ttft_p{percent}_ms": _ms(percentile([(outcome.ttft, 1) for outcome in good], percent))
           for percent in PERCENTS},
        **{f"itl_p{percent}_ms": _ms(percentile(itl, percent)) for percent in PERCENTS},
        "longest_gap_ms": _ms(longest), "normalized_latency_ms": _ms(latency),
        "slo_ttft_ms": slo.ttft_ms, "slo_itl_ms": slo.itl_ms,
        "slo_attainment": round(sum(map(slo.attained, outcomes)) / len(outcomes), 4) if bounded else None,
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)
