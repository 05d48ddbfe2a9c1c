"""Spans of this process to an OpenTelemetry collector. Imports OpenTelemetry only where somebody asks for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from .spans import listen

MAX_QUEUE, MAX_DELAY_MS = 2**15, 1000
"""A hundred steps a second have a thousand spans."""

EXPORTER = "opentelemetry.exporter.otlp.proto.http"

_exporting: dict[str, tuple[int, Callable[[], None]]] = {}
"""Endpoint -> how many asked for it, and how it ends: a process tells of a span once."""
_lock = threading.Lock()


def export_spans(endpoint: str, process: str) -> Callable[[], None]:
    """Send every span from now on to `endpoint` (OTLP over HTTP, such as http://collector:4318/v1/traces), as service
    `kvarto`, whose `process.role` is `process`. Returns what ends that, once all that was told is sent.
    """
    with _lock:
        count, end = _exporting.get(endpoint) or (0, _start(endpoint, process))
        _exporting[endpoint] = count + 1, end

    def stop() -> None:
        with _lock:
            count, end = _exporting.pop(endpoint)
            if count > 1:
                _exporting[endpoint] = count - 1, end
                return
        end()

    return stop


def _start(endpoint: str, process: str) -> Callable[[], None]:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "kvarto", "process.role": process}))
    provider.add_span_processor(BatchSpanProcessor(
        OTLPSpanExporter(endpoint), max_queue_size=MAX_QUEUE, schedule_delay_millis=MAX_DELAY_MS))
    stop = listen(_Sink(provider.get_tracer("kvarto")))

    def end() -> None:
        stop()
        provider.shutdown()

    return end


class _Sink:
    """A `SpanSink` that hands on to a tracer; a span whose thread has another open is that one's child."""

    def __init__(self, tracer: Any) -> None:
        from opentelemetry.trace import set_span_in_context

        self._tracer = tracer
        self._in_context = set_span_in_context
        self._epoch_ns = time.time_ns() - time.perf_counter_ns()
        self._local = threading.local()

    def begin(self, name: str, at_ns: int) -> None:
        opened = self._local.__dict__.setdefault("opened", [])
        parent = self._in_context(opened[-1]) if opened else None
        opened.append(self._tracer.start_span(name, context=parent, start_time=self._epoch_ns + at_ns))

    def end(self, at_ns: int) -> None:
        self._local.opened.pop().end(self._epoch_ns + at_ns)
