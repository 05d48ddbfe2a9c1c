"""The span of a step's forward pass, with what its native ops take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..kernels import op_times
from ..protos.spans import Span, heard, tell


@contextmanager
def forward_span() -> Iterator[None]:
    """`forward`, and within it a span for each kind of op: its sum over all layers, one kind behind the other."""
    if not heard():
        yield
        return
    with Span("forward"):
        at_ns = time.perf_counter_ns()
        with op_times() as taken:
            yield
        for name, nanoseconds in taken.items():
            tell(name, at_ns, at_ns + nanoseconds)
            at_ns += nanoseconds
