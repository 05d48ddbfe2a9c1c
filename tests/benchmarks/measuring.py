"""Takes the figures of `figures.py`: all sides of one in turns, round after round."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from figures import Figure, Traces, Values

Tell = Callable[[str], None]


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Sides:
    """Sides by name, made when a figure first needs them. Use as a context manager."""

    def __init__(self, makers: Mapping[str, Callable[[], Any]]) -> None:
        self._makers = makers
        self._open: dict[str, Any] = {}

    def of(self, figure: Figure) -> dict[str, Any]:
        """Those that the figure asks and that there are, closing the others: they hold memory."""
        names = [name for name in figure.sides if name in self._makers]
        for name in self._open.keys() - set(names):
            self._open.pop(name).close()
        for name in names:
            if name not in self._open:
                self._open[name] = self._makers[name]()
        return {name: self._open[name] for name in names}

    def __enter__(self) -> Sides:
        return self

    def __exit__(self, *_: object) -> None:
        while self._open:
            self._open.popitem()[1].close()


def take(
    figure: Figure, sides: Mapping[str, Any], traces: Traces, num_rounds: int, tell: Tell = tell,
) -> dict[str, list[Values]]:
    """Per side the values of every round. Odd rounds go through the sides backwards: none is always the first after a
    pause of the machine."""
    measured: dict[str, list[Values]] = {name: [] for name in sides}
    names: Sequence[str] = list(sides)
    for number in range(num_rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            values = figure.ask(sides[name], traces, number)
            measured[name].append(values)
            shown = ", ".join(f"{row} {values[row]:.4g}" for row in dict.fromkeys(row.value for row in figure.rows))
            tell(f"{figure.title}, round {number + 1} of {num_rounds}: {name}: {shown}")
    return measured
