"""The floor of a trace."""

from __future__ import annotations

import pytest
from limits import KV_BYTES, PREFILL_FLOPS, seconds_of_pass, trace_floor_s

from kvarto.cluster.cli.bench.trace import TraceRequest

PASSES = {1: 1.0, 4: 4.0, 16: 10.0}


@pytest.mark.parametrize(("rows", "seconds"), [(1, 1), (2, 2), (4, 4), (10, 7), (16, 10), (32, 20)])
def test_a_pass_between_measured_sizes_lies_on_a_line_and_beyond_them_grows_with_its_rows(rows, seconds):
    assert seconds_of_pass(PASSES, rows) == pytest.approx(seconds)


def test_the_floor_is_prefill_and_then_a_pass_and_the_cache_at_every_step():
    requests = [TraceRequest([0] * 10, 1), TraceRequest([0] * 20, 3), TraceRequest([0] * 30, 2)]
    # Prefill gives every request its first token. Two requests are left for the second, one for the third.
    prefill = 60 * PREFILL_FLOPS / 1e12
    cache = ((21 + 31) + 22) * KV_BYTES / 1e9
    assert trace_floor_s(requests, PASSES, 1e9, 1e12) == pytest.approx(prefill + 2.0 + 1.0 + cache)
