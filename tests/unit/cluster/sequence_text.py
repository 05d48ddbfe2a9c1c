"""What a rank on a model of memory knows of a sequence apart from its blocks."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

from kvarto.protos.sampling import SamplingParams

_spec = importlib.util.spec_from_file_location("stand_in", Path(__file__).with_name("stand_in.py"))
assert _spec and _spec.loader
stand_in = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stand_in)


class SequenceText:
    """Its tokens, and the numbers that stand for them in memory."""

    def __init__(self, params: SamplingParams, seq_index: int, num_prompt_tokens: int, tokens: list[int]) -> None:
        self.params = params
        self.seq_index = seq_index
        self.num_prompt_tokens = num_prompt_tokens
        self.tokens: list[int] = []
        self.chain: list[int] = []
        self.failed = False
        self.kept: list[int] = []
        """Positions of the rows that the last compaction kept; what was computed since follows."""
        # One that has generated already has had its prompt's log probabilities sent.
        self.scored = params.prompt_logprobs is not None and len(tokens) == num_prompt_tokens
        self.append(tokens)

    def append(self, tokens: Iterable[int]) -> None:
        tokens = list(tokens)
        self.tokens += tokens
        self.chain += stand_in.chain(tokens, *self.chain[-1:])

    def fork(self, seq_index: int) -> SequenceText:
        text = SequenceText(self.params, seq_index, self.num_prompt_tokens, self.tokens)
        text.kept = self.kept
        return text
