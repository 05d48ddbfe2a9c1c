"""What a request of the machine must come to, whoever else is there, and what has come of it."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("stand_in", Path(__file__).with_name("stand_in.py"))
assert _spec and _spec.loader
stand_in = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stand_in)

EOS = 3

REACHED: Counter[str] = Counter()
"""What the machine has done in this process: a machine that never swaps proves nothing about swapping."""


def common_length(one, other):
    """How many tokens both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class Expected:
    """One request: what it must come to, and what has come of it."""

    def __init__(self, prompt, params, priority, salt, produced):
        self.prompt, self.params, self.priority, self.salt = prompt, params, priority, salt
        if params.beam_width:
            self.beams = stand_in.search(prompt, params, params.max_tokens, EOS)[: params.n]
            self.outputs = [list(beam.token_ids) for beam in self.beams]
        else:
            self.beams = None
            self.outputs = [
                stand_in.generate(
                    prompt, params.max_tokens, EOS, index, params.min_tokens, params.ignore_eos)
                for index in range(params.num_sequences)]
        self.produced = [
            output[: min(count, len(output) - 1)] for output, count in zip(self.outputs, produced, strict=False)]
        self.got = [list(tokens) for tokens in self.produced] or [[] for _ in self.outputs]
        self.num_deltas = [0] * len(self.outputs)
        self.scored = False
        self.ended: set[int] = set()
        self.cancelled: set[int] = set()
        self.failed = False
        self.must_hit = 0
        """Tokens that must be found in the prefix cache as long as nothing was evicted."""

    def hand_over(self):
        """It begins again in a new Head, with the tokens that have come."""
        self.produced = [list(tokens) for tokens in self.got] if any(self.got) else []
        self.num_deltas = [0] * len(self.outputs)
        self.must_hit = 0

    @property
    def over(self):
        return self.failed or self.ended | self.cancelled >= set(range(len(self.outputs)))

    def take(self, delta, block_size, caching):
        """Check one delta against all that came before."""
        index, first = delta.seq_index, not self.num_deltas[delta.seq_index]
        assert not self.failed, "a delta after the error"
        assert index not in self.cancelled, "a delta of a cancelled sequence"
        assert index not in self.ended, "a delta after the last"
        assert delta.first == len(self.got[index]), "tokens are lost or repeated"
        assert delta.token_ids, "a delta without news"
        assert len(delta.logprobs) in (0, len(delta.token_ids))
        assert bool(delta.logprobs) or self.params.logprobs is None
        self.num_deltas[index] += 1
        self.got[index].extend(delta.token_ids)
        assert self.got[index] == self.outputs[index][: len(self.got[index])], "not the tokens that it has alone"
        complete = len(self.got[index]) == len(self.outputs[index])
        assert bool(delta.finish_reason) == complete, "ends too early or too late"
        if complete:
            self.ended.add(index)
        self._check_beam(delta)
        self._check_cached(delta, first, block_size, caching)
        if delta.prompt_logprobs:
            assert not self.scored, "prompt_logprobs are sent twice"
            assert [entry.token_id for entry in delta.prompt_logprobs] == self.prompt[1:]
            self.scored = True
        if self.params.prompt_logprobs is not None:
            assert self.scored or len(self.prompt) == 1, "tokens come before the prompt_logprobs"

    def _check_beam(self, delta):
        if self.beams is None:
            assert delta.cumulative_logprob is None and delta.beam_score is None
            last = self.outputs[delta.seq_index][-1]
            ends_by_length = last != EOS or self.params.ignore_eos or len(self.outputs[delta.seq_index]) < \
                self.params.min_tokens
            assert delta.finish_reason in (None, "length" if ends_by_length else "stop")
            return
        beam = self.beams[delta.seq_index]
        assert delta.first == 0 and delta.token_ids == list(beam.token_ids), "a beam comes whole"
        assert delta.cumulative_logprob == pytest.approx(beam.cumulative_logprob)
        assert delta.beam_score == pytest.approx(beam.score)
        assert (delta.finish_reason, delta.stop_reason) == (beam.finish_reason, beam.stop_reason)

    def check_hits(self, delta, others, block_size):
        """Nothing is found that no other request of the same salt can have left there."""
        if not self.produced and not self.num_deltas[delta.seq_index] and delta.num_cached_tokens:
            tokens = [other.prompt + output for other in others if other.salt == self.salt for output in other.outputs]
            most = max((common_length(self.prompt, text) for text in tokens), default=0)
            assert delta.num_cached_tokens <= most // block_size * block_size, "a hit on what nobody has computed"

    def _check_cached(self, delta, first, block_size, caching):
        cached = delta.num_cached_tokens
        assert cached == 0 or first, "num_cached_tokens belongs to the first delta"
        assert cached >= 0
        if not caching or self.params.prompt_logprobs is not None:
            assert cached == 0, "a prefix was found where none may be used"
        if not self.produced:
            assert cached % block_size == 0 and cached < len(self.prompt)
        if first and cached:
            REACHED["cached"] += 1
        if first and delta.seq_index == 0:
            assert cached >= self.must_hit, "a prefix that must be cached was not found"
            REACHED["follow_ups_hit"] += self.must_hit > 0
