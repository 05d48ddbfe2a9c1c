"""The child's side of `offline.py`: a program that loads a model once and then generates what it is asked to. Needs
only Python, as it runs in the peers' environments too.

A line of stdin `{"prompts": [[token ids]], "output_lens": [n]}` is answered by a line of stdout `{"seconds": s,
"tokens": n}`, after a first line `{"ready": true}`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

Generate = Callable[[list[list[int]], list[int]], int]
"""Generates exactly so many tokens for each prompt, greedily; returns the number of tokens generated."""


def private_stdout() -> int:
    """A descriptor of stdout; what libraries print from now on, in child processes too, goes to stderr."""
    descriptor = os.dup(1)
    os.dup2(2, 1)
    return descriptor


def answer(descriptor: int, generate: Generate) -> None:
    """Answer until stdin ends."""
    with os.fdopen(descriptor, "w") as answers:
        _write(answers, {"ready": True})
        for line in sys.stdin:
            ask = json.loads(line)
            began = time.perf_counter()
            tokens = generate(ask["prompts"], ask["output_lens"])
            _write(answers, {"seconds": time.perf_counter() - began, "tokens": tokens})


def _write(answers, value) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()
