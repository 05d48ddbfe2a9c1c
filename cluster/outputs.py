"""What a caller gets: the pieces of a stream, and whole results with the names this ecosystem knows."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..protos.step import TokenLogprobs


@dataclass(slots=True)
class StreamChunk:
    """News of one sequence of a request. The last chunk of a sequence has a `finish_reason`."""

    index: int
    """Which of the request's `n` completions."""
    text: str = ""
    """New text; may be empty while an incomplete character or a possible stop string is held back."""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One entry per token of `token_ids`, where asked for."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Of prompt tokens 1.., with the first chunk of a sequence, where asked for."""
    finish_reason: str | None = None
    """`stop` or `length`."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for end-of-sequence."""
    num_cached_tokens: int = 0
    cumulative_logprob: float | None = None
    """Sum over all tokens of the completion, where it comes as a whole: of a beam, and with `best_of` above `n`."""
    beam_score: float | None = None
    """Of a beam: `cumulative_logprob / num_tokens ** length_penalty`."""
    num_dropped_tokens: int = 0
    """Tokens of the completions that `best_of` passed over; with the first chunk of the request."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log probability of one candidate at one position; `rank` 1 is the likeliest."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a request."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    """Sum over the generated tokens; None where nobody asked for it: by `logprobs`, `beam_width`, or a `best_of` above
    `n`."""
    beam_score: float | None = None
    """Of a beam: `cumulative_logprob / num_tokens ** length_penalty`."""
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The state of one request; final when `finished`."""

    request_id: str
    prompt: str | None
    """None where the prompt was given as token ids."""
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """The first entry is None: nothing comes before the first token."""
    num_cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        return all(output.finished for output in self.outputs)
