"""Where the time of a run goes: spans of this process, as shares of the run and as a Chrome trace."""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from ....protos.spans import listen

PARTS: dict[str, tuple[str, ...]] = {
    "scheduling": ("schedule", "take result"),
    "transport": ("send plan", "send deltas"),
    "block moves": ("move blocks",),
    "batch": ("build batch",),
    "embedding": ("embedding", "take_rows"),
    "GEMM": ("linear", "logits"),
    "attention": ("attention",),
    "all-reduce": ("all_reduce",),
    "cache write": ("cache_write", "quantization"),
    "norms, rotary, activations": ("norm", "rotation", "activation"),
    "other ops": ("forward",),
    "sampling": ("sample", "best_tokens"),
}
"""Of spans, each without those inside it. What the engine's thread does in none of them is the rest."""
BESIDE = "detokenization (beside the engine)"
"""On the frontend's thread, while the engine's is elsewhere or waits for the interpreter lock."""


class Profile:
    """Listens while it is entered. Spans of several ranks that are threads are each their own; shares are those of the
    first thread that ran layers."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._local = threading.local()
        self._seconds: defaultdict[int, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))

    def __enter__(self) -> Self:
        self._stop = listen(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def begin(self, name: str, at_ns: int) -> None:
        self._open().append((name, at_ns))

    def end(self, at_ns: int) -> None:
        thread, opened = threading.get_ident(), self._open()
        name, begin_ns = opened.pop()
        seconds = (at_ns - begin_ns) * 1e-9
        self.events.append(
            {"name": name, "ph": "X", "ts": begin_ns / 1e3, "dur": seconds * 1e6, "pid": 0, "tid": thread})
        self._seconds[thread][name] += seconds
        if opened:
            self._seconds[thread][opened[-1][0]] -= seconds

    def shares(self, seconds: float) -> dict[str, float]:
        """Of a run of so many seconds, by the names of `PARTS`; `rest` makes them one. Then what went on beside."""
        threads: list[Mapping[str, float]] = list(self._seconds.values())
        engine = next((spans for spans in threads if "forward" in spans), {})
        # With several ranks the scheduler has a thread of its own.
        scheduler = next((spans for spans in threads if "schedule" in spans), {})
        merged = {**scheduler, **engine}
        found = {part: sum(merged.get(name, 0.0) for name in names) / seconds for part, names in PARTS.items()}
        found["rest"] = 1 - sum(found.values())
        found[BESIDE] = sum(spans.get("detokenize", 0.0) for spans in self._seconds.values()) / seconds
        return {part: round(share, 4) for part, share in found.items()}

    def write_chrome_trace(self, path: Path) -> None:
        """For chrome://tracing or https://ui.perfetto.dev. Raises `OSError`."""
        path.write_text(json.dumps({"traceEvents": self.events, "displayTimeUnit": "ms"}))

    def _open(self) -> list[tuple[str, int]]:
        if not hasattr(self._local, "open"):
            self._local.open = []
        opened: list[tuple[str, int]] = self._local.open
        return opened
