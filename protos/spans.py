"""Times of the parts of a step, told to whoever listens in this process; almost free while nobody does."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol


class SpanSink(Protocol):
    """Hears of every span on the span's own thread: those that begin inside another end inside it. Times are of
    `time.perf_counter_ns`."""

    def begin(self, name: str, at_ns: int) -> None: ...

    def end(self, at_ns: int) -> None: ...


_sinks: tuple[SpanSink, ...] = ()


def listen(sink: SpanSink) -> Callable[[], None]:
    """Tell `sink` of every span that begins from now on; call what is returned to stop."""
    global _sinks
    _sinks = (*_sinks, sink)

    def stop() -> None:
        global _sinks
        _sinks = tuple(other for other in _sinks if other is not sink)

    return stop


def heard() -> bool:
    """Whether somebody listens: what costs something to find out need not be found out otherwise."""
    return bool(_sinks)


def tell(name: str, begin_ns: int, end_ns: int) -> None:
    """A span that was timed by other means, inside the one that is open."""
    for sink in _sinks:
        sink.begin(name, begin_ns)
        sink.end(end_ns)


class Span:
    """`with Span("sample"): ...`"""

    __slots__ = ("_name", "_sinks")

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        # Whoever begins to listen inside a span does not hear of its end.
        self._sinks = _sinks
        for sink in self._sinks:
            sink.begin(self._name, time.perf_counter_ns())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for sink in self._sinks:
            sink.end(time.perf_counter_ns())
