"""A request of the frontend whose Head is the test."""

from __future__ import annotations

import asyncio

from kvarto.cluster.frontend.request_state import RequestState
from kvarto.protos.errors import KvartoError
from kvarto.protos.request import AddRequest, Delta
from kvarto.protos.sampling import SamplingParams
from kvarto.protos.step import TokenLogprobs

EOS = 0


class ByteTokenizer:
    """A token is a byte; token 0 ends a sequence and is special."""

    special_token_ids = frozenset({EOS})
    codec_errors = "replace"

    def token_bytes(self, token_id, *, first=False):
        return b"" if token_id == EOS else bytes([token_id])


class Request:
    """A `RequestState` whose Head is the test."""

    def __init__(self, **params):
        self.cancelled, self.forgotten = [], []
        self.state = RequestState(
            AddRequest(request_id="r", prompt_token_ids=[65], params=SamplingParams(**params)), ByteTokenizer(),
            cancel=lambda request_id, index: self.cancelled.append((request_id, index)), forget=self.forgotten.append)
        self.sent = {}

    def say(self, text, index=0, **fields):
        """The next tokens of a sequence, in one delta."""
        token_ids = list(text.encode()) if isinstance(text, str) else text
        first = self.sent.get(index, 0)
        self.sent[index] = first + len(token_ids)
        self.state.take(Delta(request_id="r", seq_index=index, first=first, token_ids=token_ids, **fields))

    def chunks(self):
        """All chunks until the end, an error as the last item."""
        async def collect():
            found = []
            try:
                async for chunk in self.state:
                    found.append(chunk)
            except KvartoError as error:
                found.append(error)
            return found

        return asyncio.run(asyncio.wait_for(collect(), 2))

    def text(self, index=0):
        return "".join(chunk.text for chunk in self.chunks() if chunk.index == index)


def entry(token_id, logprob=-1.0):
    return TokenLogprobs(token_id=token_id, logprob=logprob, rank=1, top_token_ids=[], top_logprobs=[])
