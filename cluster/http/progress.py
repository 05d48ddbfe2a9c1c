"""What an HTTP request has brought so far."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...protos.step import TokenLogprobs
from ..outputs import StreamChunk
from .prompts import Prompt
from .replies import PromptTokensDetails, Usage
from .streams import Job


@dataclass(slots=True)
class PromptState:
    """A prompt and what the engine said of it; shared by its choices."""

    prompt: Prompt
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)


@dataclass(slots=True)
class Choice:
    """One completion of one prompt."""

    index: int
    prompt: PromptState
    started: bool = False
    """Whether a stream has sent something of it."""
    offset: int = 0
    """Characters of the token texts that a stream has sent."""
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def keep(self, chunk: StreamChunk) -> None:
        """Gather `chunk` for a reply that is sent as a whole."""
        self.text.append(chunk.text)
        self.logprobs += chunk.logprobs


class Progress:
    """The prompts, choices and counts of one HTTP request."""

    def __init__(self, job: Job) -> None:
        self._n = job.params.n
        self._prompts = [PromptState(prompt) for prompt in job.prompts]
        # Made when news of them comes: before that nobody has checked how large `n` is.
        self._choices: dict[int, Choice] = {}
        self._num_tokens = 0

    def take(self, place: int, chunk: StreamChunk) -> Choice:
        """Count `chunk` of prompt `place`; the choice that it is news of."""
        prompt = self._prompts[place]
        index = place * self._n + chunk.index
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = Choice(index, prompt)
        self._num_tokens += len(chunk.token_ids) + chunk.num_dropped_tokens
        prompt.num_cached_tokens = max(prompt.num_cached_tokens, chunk.num_cached_tokens)
        if chunk.prompt_logprobs:
            prompt.logprobs = chunk.prompt_logprobs
        if chunk.finish_reason is not None:
            choice.finish_reason, choice.stop_reason = chunk.finish_reason, chunk.stop_reason
        return choice

    def finished(self) -> list[Choice]:
        """All choices in order. Raises when the engine's streams ended without ending each of them."""
        expected = self._n * len(self._prompts)
        choices = [self._choices[index] for index in sorted(self._choices)]
        if len(choices) != expected or any(choice.finish_reason is None for choice in choices):
            raise RuntimeError(f"the engine ended a request of {expected} completions before they were finished")
        return choices

    def usage(self) -> Usage:
        """Counts up to now."""
        prompt_tokens = sum(len(state.prompt.token_ids) for state in self._prompts)
        cached = sum(state.num_cached_tokens for state in self._prompts)
        return Usage(prompt_tokens, self._num_tokens, prompt_tokens + self._num_tokens, PromptTokensDetails(cached))
