"""How a rank's threads wait for each other."""

from __future__ import annotations

import os

SPIN_COUNT = 2000
"""Turns of libgomp's waiting loop before a thread sleeps, microseconds rather than its default milliseconds: a core
that others use too (a second rank, the Head, a frontend) is otherwise spun away while its owner waits for it."""


def limit_spinning() -> None:
    """Call it before torch is imported: libgomp reads its settings when it is loaded. What the user has set stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
