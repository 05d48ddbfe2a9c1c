"""How to turn logits into tokens: the parameters of one request, as users write them and as they cross the wire."""

from __future__ import annotations

import math
from typing import Literal

from msgspec import Struct
from msgspec.structs import force_setattr

from .errors import InvalidRequestError

MAX_LOGPROBS = 20
"""The most alternatives per position that `logprobs` and `prompt_logprobs` may ask for (OpenAI's own limit)."""


class SamplingParams(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Sampling parameters of one request, with the names and meanings that vLLM and OpenAI gave them.

    Raises `InvalidRequestError` naming the field when a value is out of range. `top_k` of 0 or -1 means the whole
    vocabulary, as it does in vLLM, and is kept as None.
    """

    n: int = 1
    """Completions of the prompt. Completion `i` draws from (seed, i, position)."""
    best_of: int | None = None
    """Completions to generate, of which the `n` with the highest mean log probability are returned; default: `n`."""
    beam_width: int | None = None
    """Beam search with this many beams, of which the best `n` are returned (scores and order as Transformers'); None:
    no beam search. Tokens come when the search ends."""
    length_penalty: float = 1.0
    """A beam's score is the sum of its log probabilities over its generated length to this power, within [-10, 10]."""
    early_stopping: bool | Literal["never"] = False
    """When a beam search ends, as in Transformers: True: with `beam_width` ended beams; False: when no running one is
    likely to beat them; "never": when none can."""
    max_tokens: int | None = 16
    """Most tokens to generate; None: as many as `max_model_len` and the block space allow."""
    min_tokens: int = 0
    """No end-of-sequence or stop token is sampled before this many tokens."""
    temperature: float = 1.0
    """0 is greedy: the token with the highest logit, the lowest id among equals."""
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    """Tokens less likely than `min_p` times the likeliest are not sampled."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or output (CTRL, arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    """Added to the logits of these token ids, each value in [-100, 100]."""
    seed: int | None = None
    """None: the frontend draws one and keeps it, so that a recovery repeats the same tokens."""
    stop: list[str] = []
    """Generation ends before the first of these strings; matched on text, by the frontend."""
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: int | None = None
    """Log probabilities of this many likeliest tokens (and of the sampled one), before any of the above is applied."""
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        if self.top_k in (0, -1):
            force_setattr(self, "top_k", None)
        for name, nothing in (("logit_bias", {}), ("stop", []), ("stop_token_ids", [])):
            if getattr(self, name) is None:
                force_setattr(self, name, nothing)
        for name in ("n", "min_tokens"):
            if getattr(self, name) is None:
                raise InvalidRequestError(f"{name} must be an integer, got None", param=name)
        _check_int("n", self.n, low=1)
        _check_int("best_of", self.best_of, low=1)
        _check_int("beam_width", self.beam_width, low=1)
        _check_float("length_penalty", self.length_penalty, low=-10.0, high=10.0)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise InvalidRequestError(
                f"early_stopping must be true, false or 'never', got {self.early_stopping!r}", param="early_stopping")
        _check_int("max_tokens", self.max_tokens, low=1)
        _check_int("min_tokens", self.min_tokens, low=0)
        _check_int("top_k", self.top_k, low=1)
        _check_int("seed", self.seed, low=-(2**63), high=2**63 - 1)
        _check_int("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS)
        _check_int("prompt_logprobs", self.prompt_logprobs, low=0, high=MAX_LOGPROBS)
        _check_float("temperature", self.temperature, low=0.0)
        _check_float("top_p", self.top_p, low=0.0, high=1.0, low_open=True)
        _check_float("min_p", self.min_p, low=0.0, high=1.0)
        _check_float("repetition_penalty", self.repetition_penalty, low=0.0, low_open=True)
        _check_float("presence_penalty", self.presence_penalty, low=-2.0, high=2.0)
        _check_float("frequency_penalty", self.frequency_penalty, low=-2.0, high=2.0)
        for token_id, bias in self.logit_bias.items():
            _check_int("logit_bias", token_id, low=0)
            _check_float("logit_bias", bias, low=-100.0, high=100.0)
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, low=0)
        if isinstance(self.stop, str):
            force_setattr(self, "stop", [self.stop])
        if any(not isinstance(s, str) or not s for s in self.stop):
            raise InvalidRequestError("stop must be non-empty strings", param="stop")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})", param="min_tokens")
        if self.best_of is not None and self.best_of < self.n:
            raise InvalidRequestError(f"best_of ({self.best_of}) is below n ({self.n})", param="best_of")
        if self.beam_width is not None:
            self._check_beam_search()
        elif self.length_penalty != 1.0 or self.early_stopping:
            name = "early_stopping" if self.early_stopping else "length_penalty"
            raise InvalidRequestError(f"{name} has no effect without a beam search: set beam_width", param=name)
        if self.stop and not self.detokenize:
            raise InvalidRequestError("stop strings are matched on text: set detokenize=True", param="stop")

    def _check_beam_search(self) -> None:
        assert self.beam_width is not None
        if self.n > self.beam_width:
            raise InvalidRequestError(f"n ({self.n}) is above beam_width ({self.beam_width})", param="n")
        # A search draws nothing and ranks whole beams by the model's own probabilities.
        others = dict(
            best_of=self.best_of is not None, temperature=self.temperature not in (0.0, 1.0),
            top_k=self.top_k is not None, top_p=self.top_p != 1.0, min_p=self.min_p != 0.0,
            repetition_penalty=self.repetition_penalty != 1.0, presence_penalty=self.presence_penalty != 0.0,
            frequency_penalty=self.frequency_penalty != 0.0, logit_bias=bool(self.logit_bias), stop=bool(self.stop),
            min_tokens=self.min_tokens > 0, logprobs=self.logprobs is not None,
            prompt_logprobs=self.prompt_logprobs is not None)
        for name, given in others.items():
            if given:
                raise InvalidRequestError(f"{name} has no effect in a beam search: leave it out", param=name)

    @property
    def num_sequences(self) -> int:
        """Most sequences that the request has at one time."""
        return self.beam_width or self.best_of or self.n

    def beam_end_tokens(self, eos_token_ids: tuple[int, ...]) -> frozenset[int]:
        """Tokens that end a beam; `eos_token_ids` are the model's."""
        return frozenset(self.stop_token_ids) | (frozenset() if self.ignore_eos else frozenset(eos_token_ids))

    def num_beam_candidates(self, eos_token_ids: tuple[int, ...]) -> int:
        """Likeliest tokens that a step of the search needs of each beam, as many as Transformers takes; 0: no beam
        search. `beam_width` beams go on however many of their best continuations end."""
        return (self.beam_width or 0) * max(2, 1 + len(self.beam_end_tokens(eos_token_ids)))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _check_int(name: str, value: int | None, *, low: int, high: int | None = None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(f"{name} must be an integer, got {value!r}", param=name)
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequestError(f"{name} must be {bound}, got {value}", param=name)


def _check_float(name: str, value: float, *, low: float, high: float = math.inf, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidRequestError(f"{name} must be a finite number, got {value!r}", param=name)
    if value < low or (low_open and value == low) or value > high:
        start = f"above {low:g}" if low_open else f"at least {low:g}"
        end = "" if high == math.inf else f" and at most {high:g}"
        raise InvalidRequestError(f"{name} must be {start}{end}, got {value:g}", param=name)
