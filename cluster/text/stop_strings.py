"""Finding stop strings in text that comes in pieces."""

from __future__ import annotations

import re


class StopMatcher:
    """Passes text on until the first stop string, holding back whatever may still turn out to begin one.

    The match is the one that starts first, and of those the shortest; where a stop string lies inside another one that
    has begun earlier, the answer waits until the latter has failed or matched. How the text is cut into pieces makes no
    difference. Every character costs O(number of stop strings) (Knuth-Morris-Pratt).
    """

    def __init__(self, stops: list[str], include_in_output: bool) -> None:
        """`stops` must not hold empty strings. `include_in_output`: the matched one is part of the text."""
        self._include = include_in_output
        self._patterns = [_Pattern(stop) for stop in dict.fromkeys(stops)]
        self._first_char = re.compile("|".join({re.escape(stop[0]) for stop in stops}))
        self._held = ""
        self._held_from = 0
        self._position = 0
        """Characters seen so far; `_held` holds those from `_held_from` on."""
        self._candidate: tuple[int, str] | None = None
        """Start and text of the best match so far, while another may still begin before it."""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that can be given out now, and the stop string if this is where the text ends. What comes after a
        match is dropped."""
        if self._matched is not None:
            return "", self._matched
        if not self._patterns:
            return text, None
        # Most text holds no character that begins a stop string; with nothing held back, no stop string has begun.
        skipped = 0 if self._held else self._num_chars_before_a_beginning(text)
        self._held += text
        self._position += skipped
        for char in text[skipped:]:
            self._position += 1
            for pattern in self._patterns:
                if pattern.advance(char):
                    self._consider(self._position - len(pattern.text), pattern.text)
            if self._candidate is not None and self._candidate[0] <= self._oldest_beginning():
                return self._end(*self._candidate)
        return self._release(self._oldest_beginning()), None

    def flush(self) -> tuple[str, str | None]:
        """At the end of the text: what was held back, up to a match that was waiting for an earlier one to fail."""
        if self._candidate is not None and self._matched is None:
            return self._end(*self._candidate)
        return self._release(self._position), self._matched

    def _num_chars_before_a_beginning(self, text: str) -> int:
        match = self._first_char.search(text)
        return match.start() if match else len(text)

    def _consider(self, start: int, stop: str) -> None:
        if self._candidate is None or start < self._candidate[0]:
            self._candidate = (start, stop)

    def _oldest_beginning(self) -> int:
        return self._position - max(pattern.num_matched for pattern in self._patterns)

    def _end(self, start: int, stop: str) -> tuple[str, str]:
        text = self._release(start + len(stop) if self._include else start)
        self._held, self._matched = "", stop
        return text, stop

    def _release(self, end: int) -> str:
        count = end - self._held_from
        text, self._held = self._held[:count], self._held[count:]
        self._held_from = end
        return text


class _Pattern:
    """One stop string, and how many of its first characters the text ends with."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.num_matched = 0
        self._borders = _borders(text)

    def advance(self, char: str) -> bool:
        """Take one more character; True when it completes the stop string."""
        while self.num_matched and self.text[self.num_matched] != char:
            self.num_matched = self._borders[self.num_matched]
        self.num_matched += self.text[self.num_matched] == char
        if self.num_matched < len(self.text):
            return False
        self.num_matched = self._borders[self.num_matched]
        return True


def _borders(text: str) -> list[int]:
    """For every length, the longest proper prefix of `text[:length]` that is also its suffix."""
    borders = [0, 0]
    length = 0
    for char in text[1:]:
        while length and text[length] != char:
            length = borders[length]
        length += text[length] == char
        borders.append(length)
    return borders
