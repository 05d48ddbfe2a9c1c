"""Of `best_of` completions the `n` best."""

from __future__ import annotations

from collections import defaultdict

import msgspec

from ...protos.sampling import SamplingParams
from ..outputs import StreamChunk


class BestOf:
    """Keeps the chunks of a request with `best_of` above `n` until all of its completions have ended."""

    def __init__(self, params: SamplingParams) -> None:
        self._params = params
        self._chunks: defaultdict[int, list[StreamChunk]] = defaultdict(list)

    @staticmethod
    def is_asked(params: SamplingParams) -> bool:
        """Whether some completions are left out, so that none can be handed out before the last has ended."""
        return params.best_of is not None and params.best_of > params.n

    @property
    def engine_params(self) -> SamplingParams:
        """What the engine is asked for: completions are ranked by log probabilities, wanted by the user or not."""
        if self._params.logprobs is not None:
            return self._params
        return msgspec.structs.replace(self._params, logprobs=0)

    def keep(self, chunk: StreamChunk) -> None:
        """Another chunk of one of the completions."""
        self._chunks[chunk.index].append(chunk)

    def ranked(self) -> list[StreamChunk]:
        """The `n` completions with the highest mean log probability of a token, best first, each as one chunk with its
        rank as its index; of equals the one that was earlier. What concerns the prompt is with the first."""
        completions = [self._joined(self._chunks[index]) for index in sorted(self._chunks)]
        best = sorted(completions, key=_mean_logprob, reverse=True)[:self._params.n]
        for rank, completion in enumerate(best):
            completion.index = rank
        kept = [chunk for chunks in self._chunks.values() for chunk in chunks]
        best[0].prompt_logprobs = next((chunk.prompt_logprobs for chunk in kept if chunk.prompt_logprobs), None)
        best[0].num_cached_tokens = max(chunk.num_cached_tokens for chunk in kept)
        best[0].num_dropped_tokens = _num_tokens(completions) - _num_tokens(best)
        return best

    def _joined(self, chunks: list[StreamChunk]) -> StreamChunk:
        logprobs = [entry for chunk in chunks for entry in chunk.logprobs]
        last = chunks[-1]
        return StreamChunk(
            index=last.index, text="".join(chunk.text for chunk in chunks),
            token_ids=[token_id for chunk in chunks for token_id in chunk.token_ids],
            logprobs=[] if self._params.logprobs is None else logprobs, finish_reason=last.finish_reason,
            stop_reason=last.stop_reason, cumulative_logprob=sum(entry.logprob for entry in logprobs))


def _mean_logprob(completion: StreamChunk) -> float:
    assert completion.cumulative_logprob is not None
    return completion.cumulative_logprob / len(completion.token_ids)


def _num_tokens(completions: list[StreamChunk]) -> int:
    return sum(len(completion.token_ids) for completion in completions)
