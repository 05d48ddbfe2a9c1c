"""Requests of random tokens for an engine in this process."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ....protos.sampling import SamplingParams
    from ...frontend.llm import LLM

NumRounds = Annotated[int, typer.Option(min=1, help="Rounds, each with prompts of its own; medians are shown.")]


def random_prompts(rng: random.Random, vocab_size: int, count: int, length: int) -> list[list[int]]:
    """Prompts without a common beginning."""
    return [rng.choices(range(vocab_size), k=length) for _ in range(count)]


def vocab_size(llm: LLM) -> int:
    return int(llm.status()["info"]["vocab_size"])


def seconds_of(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams, *, show_progress: bool) -> float:
    """Seconds that all prompts take, submitted at once."""
    began = time.perf_counter()
    llm.generate(list(prompts), params, use_tqdm=show_progress)
    return time.perf_counter() - began


def counter(llm: LLM, name: str) -> int:
    """One of the sums in the status, over all worker groups."""
    return sum(int(group[name]) for group in llm.status()["groups"].values())
