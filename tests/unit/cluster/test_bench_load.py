"""How a load is sent: when it is due, and a failure of one request is an outcome."""

from __future__ import annotations

import asyncio
import time

import pytest

from kvarto.cluster.cli.bench.load import run_load
from kvarto.cluster.cli.bench.trace import TraceRequest
from kvarto.protos.errors import UnavailableError


class Client:
    """Sends the tokens of an answer in pairs; the prompt's first token says what goes wrong."""

    counts_pieces = False

    def __init__(self):
        self.sent, self.closed, self.open = [], 0, 0

    async def stream(self, prompt, output_len):
        self.sent.append(time.perf_counter())
        try:
            await asyncio.sleep(0.01)
            if prompt[0] == 1:
                raise UnavailableError("503: rank 1 is dead")
            if prompt[0] == 2:
                await asyncio.sleep(60)
            for count in range(2, output_len + (prompt[0] != 3), 2):
                yield count
            yield output_len - (prompt[0] == 3)
        finally:
            self.closed += 1


def run(client, kinds, due, output_len=6):
    requests = [TraceRequest([kind], output_len) for kind in kinds]
    ended = []
    return asyncio.run(run_load(client, requests, due, 0.3, lambda: ended.append(1))), ended


def test_requests_are_sent_when_due_and_none_waits_for_another():
    client = Client()
    began = time.perf_counter()
    outcomes, ended = run(client, [2, 0, 0], [0.0, 0.0, 0.15])
    assert [outcome.num_tokens for outcome in outcomes] == [0, 6, 6]
    assert outcomes[1].ended < 0.15 <= outcomes[2].ended
    assert client.sent[2] - began >= 0.15
    assert len(ended) == 3


def test_ttft_counts_from_when_a_request_was_due():
    class Late(Client):
        async def stream(self, prompt, output_len):
            time.sleep(0.05)  # a client that cannot keep up
            async for count in super().stream(prompt, output_len):
                yield count

    outcomes, _ = run(Late(), [0, 0, 0], [0.0, 0.0, 0.0])
    assert max(outcome.ttft for outcome in outcomes) >= 0.15


@pytest.mark.parametrize(("kind", "error"), [
    (1, "503: rank 1 is dead"), (2, "not ended within 0.3 s"), (3, "ended after 5 of 6 tokens")])
def test_a_failure_is_the_outcome_of_its_request_alone(kind, error):
    client = Client()
    outcomes, _ = run(client, [0, kind, 0], [0.0] * 3)
    assert [outcome.error for outcome in outcomes] == [None, error, None]
    assert client.closed == 3


def test_a_programming_error_ends_the_run_and_every_stream():
    class Broken(Client):
        async def stream(self, prompt, output_len):
            if prompt[0] == 9:
                raise ZeroDivisionError
            async for count in super().stream(prompt, output_len):
                yield count

    client = Broken()
    with pytest.raises(ZeroDivisionError):
        run(client, [2, 9], [0.0, 0.05])
    assert client.closed == 1
