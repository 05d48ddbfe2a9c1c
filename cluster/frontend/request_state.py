"""What a frontend keeps of one request: every token received so far, and the text that is still held back."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import msgspec

from ...protos.errors import KvartoError, error_from_name
from ...protos.request import AddRequest, Delta
from ..outputs import StreamChunk
from ..text.detokenizer import IncrementalDetokenizer
from ..text.stop_strings import StopMatcher
from ..text.tokenizer import Tokenizer
from .best_of import BestOf


class _SequenceState:
    """One of the request's sequences."""

    def __init__(self, request: AddRequest, tokenizer: Tokenizer) -> None:
        params = request.params
        self.token_ids: list[int] = []
        self.finished = False
        self._params = params
        self._matcher = StopMatcher(params.stop, params.include_stop_str_in_output) if params.stop else None
        self._detokenizer = (
            IncrementalDetokenizer(tokenizer, request.prompt_token_ids, params.skip_special_tokens)
            if params.detokenize else None)

    def take(self, token_ids: list[int], *, ended_by_token: bool, last: bool) -> tuple[str, str | None]:
        """New text, and the stop string that ended it; of `token_ids` those up to it are kept. `ended_by_token`: the
        last token is an end-of-sequence or stop token, which is no text unless the request wants it."""
        text, matched = [], None
        for place, token_id in enumerate(token_ids):
            self.token_ids.append(token_id)
            ends = ended_by_token and place == len(token_ids) - 1
            if self._detokenizer is None or (ends and not self._params.include_stop_str_in_output):
                continue
            new, matched = self._match(self._detokenizer.push([token_id]))
            text.append(new)
            if matched is not None:
                return "".join(text), matched
        if last and self._detokenizer is not None:
            new, matched = self._match(self._detokenizer.flush())
            text.append(new)
            if matched is None and self._matcher is not None:
                new, matched = self._matcher.flush()
                text.append(new)
        return "".join(text), matched

    def _match(self, text: str) -> tuple[str, str | None]:
        # Before `min_tokens` a stop string does not count, as in vLLM.
        if self._matcher is None or len(self.token_ids) <= self._params.min_tokens:
            return text, None
        return self._matcher.push(text)


class RequestState:
    """A request between its submission and its last chunk. An async iterator of `StreamChunk`.

    `cancel(request_id, seq_index)` tells the Head that a sequence, or with None the whole request, is not wanted any
    more. `forget` is called once, when nothing more will come. `request` is what the Head is to be sent: with
    `best_of` above `n` it asks for log probabilities also where the user has not.
    """

    def __init__(
        self, request: AddRequest, tokenizer: Tokenizer, *, cancel: Callable[[str, int | None], None],
        forget: Callable[[str], None],
    ) -> None:
        params = request.params
        self._best_of = BestOf(params) if BestOf.is_asked(params) else None
        self.request = (
            request if self._best_of is None
            else msgspec.structs.replace(request, params=self._best_of.engine_params))
        # A beam search says nothing of its beams until the best `n` are chosen.
        num_sequences = params.num_sequences if params.beam_width is None else params.n
        self._sequences = [_SequenceState(request, tokenizer) for _ in range(num_sequences)]
        self._chunks: deque[StreamChunk] = deque()
        self._news = asyncio.Event()
        self._error: KvartoError | None = None
        self._closed = False
        self._cancel = cancel
        self._forget = forget

    def take(self, delta: Delta) -> None:
        """A delta came from the Head. What is repeated is dropped."""
        if delta.error is not None:
            self.fail(error_from_name(delta.error.name, delta.error.message, delta.error.param))
            return
        sequence = self._sequences[delta.seq_index]
        repeated = len(sequence.token_ids) - delta.first
        if sequence.finished or self._closed:
            return
        if repeated < 0:
            self._cancel(self.request.request_id, None)
            self.fail(KvartoError(f"tokens {len(sequence.token_ids)} to {delta.first} of the answer were lost"))
            return
        token_ids = delta.token_ids[repeated:]
        if not token_ids and delta.finish_reason is None:
            return
        num_before = len(sequence.token_ids)
        text, matched = sequence.take(
            token_ids, ended_by_token=delta.finish_reason == "stop", last=delta.finish_reason is not None)
        # Tokens that came after a stop string are not part of the answer.
        count = len(sequence.token_ids) - num_before
        chunk = StreamChunk(
            index=delta.seq_index, text=text, token_ids=token_ids[:count],
            logprobs=delta.logprobs[repeated: repeated + count],
            prompt_logprobs=delta.prompt_logprobs or None, finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason, num_cached_tokens=delta.num_cached_tokens,
            cumulative_logprob=delta.cumulative_logprob, beam_score=delta.beam_score)
        if matched is not None:
            if delta.finish_reason is None:
                self._cancel(self.request.request_id, delta.seq_index)
            chunk.finish_reason, chunk.stop_reason = "stop", matched
        sequence.finished = chunk.finish_reason is not None
        is_over = all(s.finished for s in self._sequences)
        if self._best_of is None:
            self._chunks.append(chunk)
        else:
            self._best_of.keep(chunk)
            if is_over:
                self._chunks.extend(self._best_of.ranked())
        self._news.set()
        if is_over:
            self._end()

    def fail(self, error: KvartoError) -> None:
        """End the request with `error`, after the chunks that are there already."""
        if not self._closed:
            self._error = error
            self._end()
            self._news.set()

    def __aiter__(self) -> RequestState:
        return self

    async def __anext__(self) -> StreamChunk:
        while not self._chunks:
            if self._error is not None:
                raise self._error
            if self._closed:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._chunks.popleft()

    async def aclose(self) -> None:
        """Cancel what still runs. Idempotent."""
        if not self._closed:
            self._cancel(self.request.request_id, None)
            self._end()
            self._news.set()

    def _end(self) -> None:
        self._closed = True
        self._forget(self.request.request_id)
