"""A frontend without an engine, and an HTTP server in a thread, for the tests of the HTTP and gRPC fronts.

A token is a byte, and every completion "generates" the bytes of `FakeFrontend.reply` over and over.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from kvarto.cluster.admission import check, check_cache_salt
from kvarto.cluster.frontend_protocol import Health
from kvarto.cluster.http.app import create_app
from kvarto.cluster.outputs import StreamChunk
from kvarto.protos.config import ServeConfig
from kvarto.protos.request import EngineInfo, KVPool
from kvarto.protos.step import TokenLogprobs

MODEL = "org/fake"
VOCAB = 256


class FakeTokenizer:
    """One token per byte."""

    def __init__(self, *, has_chat_template=True):
        self.has_chat_template = has_chat_template

    def encode(self, text, add_special_tokens=True):
        return ([1] if add_special_tokens else []) + list(text.encode())

    def decode(self, ids, skip_special_tokens=True):
        return bytes(i for i in ids if not (skip_special_tokens and i == 1)).decode(errors="replace")

    def token_text(self, token_id):
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id):
        return bytes([token_id])

    def apply_chat_template(self, messages, add_generation_prompt=True, **kwargs):
        parts = [f"<{m['role']}>{m['content']}" for m in messages] + [f"{k}={v}" for k, v in kwargs.items()]
        return "".join(parts) + ("<assistant>" if add_generation_prompt else "")


class FakeStream:
    """Chunks of one request; effective `aclose` whether or not it has begun."""

    def __init__(self, frontend, request_id, prompt, params):
        self._frontend, self._id = frontend, request_id
        self._chunks = frontend.chunks(prompt, params)

    def __aiter__(self):
        return self

    async def __anext__(self):
        try:
            return await anext(self._chunks)
        except StopAsyncIteration:
            self._frontend.running.discard(self._id)
            raise

    async def aclose(self):
        await self._chunks.aclose()
        if self._id in self._frontend.running:
            self._frontend.running.discard(self._id)
            self._frontend.cancelled[self._id] = time.monotonic()


class FakeFrontend:
    """Says `reply`, or fails as it is told to."""

    def __init__(self, config, *, reply="Hello, world. ", delay_s=0.0, max_model_len=512):
        self.config = config
        self.info = EngineInfo(epoch=1, max_model_len=max_model_len, vocab_size=VOCAB, max_num_seqs=8,
                               kv_capacity_tokens=4096, block_size=16, max_num_batched_tokens=2048,
                               kv_pools=[KVPool(num_blocks=256)], num_host_blocks=0,
                               kernels="none", dtype="float32", kv_cache_dtype="float32", tp_size=1, num_groups=1)
        self.tokenizer = FakeTokenizer()
        self.default_sampling = {}
        self.reply, self.delay_s = reply, delay_s
        self.failure = None
        """Raised after `fail_after` tokens of a request whose prompt contains `fail_on`."""
        self.fail_after, self.fail_on = 0, b""
        self.state = Health(live=True, ready=True)
        self.url = ""
        self.submitted, self.running, self.cancelled, self.cache_salts = {}, set(), {}, []

    def stream(self, prompt, params, *, request_id, priority=0, cache_salt=""):
        check_cache_salt(cache_salt)
        check(prompt, params, self.info)
        self.submitted[request_id] = (prompt, params, priority)
        self.cache_salts.append(cache_salt)
        self.running.add(request_id)
        return FakeStream(self, request_id, prompt, params)

    async def chunks(self, prompt, params):
        data = self.reply.encode()
        ends = params.max_tokens if params.max_tokens is not None else len(data)
        if params.beam_width is not None:
            for index in range(params.n):
                tokens = [data[(step + index) % len(data)] for step in range(ends)]
                yield StreamChunk(index, bytes(tokens).decode(), tokens, finish_reason="length",
                                  cumulative_logprob=-3.0 - index, beam_score=-1.5 - index)
            return
        texts = [""] * params.n
        done = [False] * params.n
        for step in range(ends):
            await asyncio.sleep(self.delay_s)
            if self.failure is not None and step >= self.fail_after and self.fail_on in bytes(prompt):
                raise self.failure
            for index in (i for i in range(params.n) if not done[i]):
                token = data[(step + index) % len(data)]
                texts[index] += chr(token)
                stop = next((s for s in params.stop if texts[index].endswith(s)), None)
                finish = "stop" if stop else "length" if step + 1 == ends else None
                done[index] = finish is not None
                yield StreamChunk(
                    index, "" if stop else chr(token), [token], finish_reason=finish, stop_reason=stop,
                    num_cached_tokens=len(prompt) // 16 * 16 if step == 0 else 0,
                    num_dropped_tokens=(params.num_sequences - params.n) * ends if step == index == 0 else 0,
                    logprobs=[] if params.logprobs is None else [top_of(token, params.logprobs)],
                    prompt_logprobs=[top_of(t, params.prompt_logprobs) for t in prompt[1:]]
                    if params.prompt_logprobs is not None and step == 0 else None)

    async def status(self):
        return {"groups": [{"state": "ready"}]}

    async def blocks(self):
        return {"groups": {}}

    async def metrics(self):
        return "# TYPE kvarto_running gauge\nkvarto_running 3\n"

    async def drain(self):
        self.state = Health(live=True, ready=False, reason="the server is shutting down")
        return len(self.running)

    def health(self):
        return self.state


def top_of(token, num_top):
    """The sampled token second-best after its successor, the way `TokenLogprobs` has it."""
    ids = [(token + 1 + i) % VOCAB for i in range(num_top)]
    return TokenLogprobs(token_id=token, logprob=-0.5, rank=2, top_token_ids=ids,
                         top_logprobs=[-0.25 - i for i in range(num_top)])


def make_config(**values):
    return ServeConfig.parse({"model": MODEL, "grpc_port": 0, **values})


@contextmanager
def shared_server() -> Iterator[Callable[[FakeFrontend], FakeFrontend]]:
    """A server for several tests, as starting one takes a while: a function that puts a new frontend behind it."""
    current = []

    async def get_frontend():
        return current[-1]

    def use(frontend):
        frontend.url = url
        current.append(frontend)
        return frontend

    with running(None, get_frontend, make_config()) as url:
        yield use


@contextmanager
def running(frontend, get_frontend=None, config=None) -> Iterator[str]:
    """The base URL of a server in front of `frontend`, until the context is left."""
    async def same():
        return frontend

    with serving_app(create_app(get_frontend or same, config or frontend.config)) as url:
        yield url


@contextmanager
def serving_app(app) -> Iterator[str]:
    """The base URL of `app`, until the context is left."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(10)
            assert not thread.is_alive()


def wait_until(condition, timeout_s=5.0):
    """Seconds until `condition()` holds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < timeout_s, "it did not come about in time"
        time.sleep(0.01)
    return time.monotonic() - start
