"""What became of one request, as its client saw it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Outcome:
    """Times are seconds since the run began. A request that failed has an `error` and counts for no latency."""

    arrived: float
    """When it was due, not when it was sent: a client that falls behind must not make the server look fast."""
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    """A piece of the answer each: when it came, and how many tokens had come by then."""
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        return self.arrivals[-1][1] if self.arrivals else 0

    @property
    def ended(self) -> float:
        return self.arrivals[-1][0]

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token."""
        return self.arrivals[0][0] - self.arrived

    @property
    def mean_itl(self) -> float:
        """Seconds per token after the first; 0 for an answer of one token."""
        return (self.ended - self.arrivals[0][0]) / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0

    @property
    def normalized_latency(self) -> float:
        """Seconds from arrival to the end, per output token (PagedAttention, section 6.1)."""
        return (self.ended - self.arrived) / self.num_tokens

    def gaps(self) -> list[tuple[float, int]]:
        """(seconds, tokens) of each piece after the first: how long the client waited for it, and what it brought."""
        return [(time - before, count - had)
                for (before, had), (time, count) in zip(self.arrivals, self.arrivals[1:], strict=False)]

    def end_with(self, num_tokens: int) -> None:
        """The server's own count of all tokens, which overrules a count by pieces."""
        times = [time for time, _ in self.arrivals]
        counts = [min(count, num_tokens) for _, count in self.arrivals]
        if counts:
            counts[-1] = num_tokens
        self.arrivals = [(time, count) for time, count, before in zip(times, counts, [0, *counts], strict=False)
                         if count > before]
