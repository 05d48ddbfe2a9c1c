"""Which worker group gets a request."""

from __future__ import annotations

from collections.abc import Mapping


def pick_group(loads: Mapping[int, int]) -> int | None:
    """The living group with the fewest unfinished requests, the first of equals; None: no group lives.

    `loads` maps the index of each living group to its unfinished requests.
    """
    return min(loads, key=lambda index: (loads[index], index), default=None)
