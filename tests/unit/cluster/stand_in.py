"""A stand-in for the language model: which token follows which, and what a request must therefore come to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from kvarto.protos.sampling import SamplingParams

VOCAB = 50
_MODULUS = 2**61 - 1


def chain(tokens: Iterable[int], begin: int = 17) -> list[int]:
    """For every position a number that stands for its keys and values: it depends on all tokens up to there, and on
    nothing else. `begin` is the number of the token before."""
    numbers = []
    for token in tokens:
        begin = (begin * 1_000_003 + token + 7) % _MODULUS
        numbers.append(begin)
    return numbers


def _mix(number: int, other: int) -> int:
    mixed = (number ^ (other + 1) * 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    return (mixed ^ mixed >> 29) * 0x94D049BB133111EB >> 16 & 0xFFFFFFFF


def next_token(tokens: Sequence[int], seq_index: int = 0) -> int:
    """The token that sequence `seq_index` of a request draws after `tokens`, whoever computes it."""
    return draw(chain(tokens)[-1], seq_index)


def draw(number: int, seq_index: int) -> int:
    """`next_token` of tokens whose `chain` ends with `number`."""
    return _mix(number, seq_index) % VOCAB


def generate(
    prompt: list[int], max_tokens: int, eos: int, seq_index: int = 0, min_tokens: int = 0, ignore_eos: bool = False
) -> list[int]:
    """All tokens of one completion. (The stand-in samples an end-of-sequence token before `min_tokens`, too: the
    scheduler must go on.)"""
    tokens = list(prompt)
    while len(tokens) - len(prompt) < max_tokens:
        tokens.append(next_token(tokens, seq_index))
        if tokens[-1] == eos and not ignore_eos and len(tokens) - len(prompt) >= min_tokens:
            break
    return tokens[len(prompt):]


def candidates(number: int, count: int) -> tuple[list[int], list[float]]:
    """The `count` likeliest tokens after those whose `chain` ends with `number`, with distinct log probabilities."""
    logprobs = [-(_mix(number, token) % 10_000_019) / 1e6 - token * 1e-9 for token in range(VOCAB)]
    best = sorted(range(VOCAB), key=lambda token: -logprobs[token])[:count]
    return best, [logprobs[token] for token in best]


def search(prompt: list[int], params: SamplingParams, max_tokens: int, eos: int) -> list[Any]:
    """The hypotheses of a beam search, best first, by a `BeamSearch` alone: no scheduler, no blocks, no steps."""
    from kvarto.cluster.scheduler.beam_search import BeamSearch

    beam_search = BeamSearch(params, frozenset({eos}), max_tokens)
    count = params.num_beam_candidates((eos,))
    beams = [list(prompt)]
    while continuations := beam_search.advance([candidates(chain(beam)[-1], count) for beam in beams]):
        beams = [[*beams[each.parent], each.token_id] for each in continuations]
    return list(beam_search.results())
