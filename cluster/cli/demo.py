"""`kvarto demo`: a server from nothing, a chat answer, a batch of completions, and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
from rich.console import Console

from ..model_hub import resolve_model
from .server_process import ServerProcess

MODEL = "smollm2-135m"
QUESTION = "Give me three tips for staying healthy."
PROMPTS = [
    "The capital of France is", "Water boils at", "The three primary colours are", "A poem about the sea:\n",
    "To make a cup of tea, first", "The quick brown fox", "In 1969, humans first", "The opposite of hot is",
    "My favourite season is spring because", "A triangle has", "The largest planet is", "Once upon a time",
    "The best way to learn is", "Rain falls when", "A good friend is someone who", "The sun rises in the",
]
MAX_TOKENS = 48

console = Console(highlight=False)


def run_demo() -> int:
    """Returns the exit code. Raises `KvartoError` when the server does not come up or does not end well."""
    console.rule("[bold]kvarto demo")
    console.print(f"model: {resolve_model(MODEL)}")
    server = ServerProcess(
        [MODEL, "--max-model-len", "2048"], lambda line: console.print(f"[dim]{line}", soft_wrap=True))
    console.print("$ kvarto serve " + " ".join(server.arguments))
    with contextlib.ExitStack() as stack:
        with console.status("starting Ray, the Head, a rank and the HTTP server"):
            stack.enter_context(server)
        asyncio.run(_talk(server.url))
    console.print("the server has ended cleanly")
    return 0


async def _talk(url: str) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        console.rule("a chat answer, streamed")
        console.print(f"[bold]user[/] {QUESTION}\n[bold]assistant[/] ", end="")
        body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 128, "temperature": 0}
        started, first_s, count = time.monotonic(), None, 0
        async for event in _events(client, "/v1/chat/completions", body):
            first_s = first_s or time.monotonic() - started
            count += 1
            console.print(event["choices"][0]["delta"].get("content") or "", end="", markup=False, soft_wrap=True)
        seconds = time.monotonic() - started
        console.print(f"\n[dim]first token after {(first_s or seconds) * 1e3:.0f} ms, {count / seconds:.1f} tokens/s")

        console.rule(f"{len(PROMPTS)} completions at once")
        started = time.monotonic()
        replies = await asyncio.gather(*(
            client.post("/v1/completions", json={
                "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True})
            for prompt in PROMPTS))
        seconds = time.monotonic() - started
        tokens = sum(reply.json()["usage"]["completion_tokens"] for reply in replies)
        for prompt, reply in list(zip(PROMPTS, replies, strict=True))[:4]:
            text = " ".join(reply.json()["choices"][0]["text"].split())
            console.print(f"[bold]{prompt.strip()}[/] {text[:90]}...", soft_wrap=True)
        console.print(f"[dim]{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.0f} tokens/s")


async def _events(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield json.loads(line[6:])
