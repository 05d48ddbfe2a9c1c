"""How each side is started: the same model, KV pools of the same size, all cores, the prefix cache off everywhere."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limits import KV_BYTES
from peers.offline import OfflineProcess
from peers.pss import resident_pool_bytes
from peers.servers import KvartoServer, PeerServer, Serving
from peers.sides import Limits, Offline, Server, Side
from peers.vllm_settings import KV_POOL_GIB, environment

from kvarto.cluster.model_hub import resolve_model

GGUF = Path(resolve_model("smollm2-135m"))
THREADS = len(os.sched_getaffinity(0))
BLOCK_SIZE = 16
POOL_BYTES = KV_POOL_GIB * 2**30
MAX_MODEL_LEN = 2048
ONE_BY_ONE = 8
"""Requests of a trace that Transformers runs one by one: all would take minutes."""
LLAMA_SLOTS, LLAMA_CONTEXT = 32, 65536

OURS: dict[str, Any] = {
    "dtype": "bfloat16", "block_size": BLOCK_SIZE, "num_blocks": POOL_BYTES // (BLOCK_SIZE * KV_BYTES),
    "swap_space_bytes": 0, "max_model_len": MAX_MODEL_LEN, "enable_prefix_caching": False}
VLLM: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": MAX_MODEL_LEN, "enable_prefix_caching": False}


def makers(args: argparse.Namespace, model: Path) -> tuple[dict[str, Callable[[], Side]], list[str]]:
    """A maker per side that the arguments give a program for; and notes on what is not as it should be."""
    python = sys.executable

    def kvarto(*, path: Path = model, keep: bool = True, **options: Any) -> Offline:
        return Offline(
            lambda: OfflineProcess(python, "kvarto_offline.py", str(path), {**OURS, **options}),
            lambda pid: resident_pool_bytes(pid, OURS["num_blocks"] * BLOCK_SIZE * KV_BYTES), keep=keep)

    def kvarto_server(*, grpc: bool = False) -> Server:
        return Server(KvartoServer([str(model), *_flags(OURS), "--threads-per-rank", str(THREADS)]), grpc=grpc)

    def transformers(size: int, num_requests: int | None = None) -> Offline:
        options = {"batch_size": size, "threads": THREADS}
        return Offline(lambda: OfflineProcess(python, "transformers_offline.py", str(model), options),
                       num_requests=num_requests)

    found: dict[str, Callable[[], Side]] = {
        "limits": Limits,
        "kvarto": lambda: kvarto(threads_per_rank=THREADS),
        # On the GGUF file itself, whose 4-bit weights stay as they are; so does llama.cpp.
        "kvarto_int4": lambda: kvarto(path=GGUF, threads_per_rank=THREADS, quantization="int4"),
        # On Ray, whose parts watch each other's clocks: it cannot stand still while another is measured.
        "kvarto_tp2": lambda: kvarto(keep=False, tensor_parallel_size=2, threads_per_rank=max(1, THREADS // 2)),
        "kvarto_http": kvarto_server,
        "kvarto_grpc": lambda: kvarto_server(grpc=True)}
    notes: list[str] = []
    if args.transformers:
        found |= {"transformers": lambda: transformers(1, ONE_BY_ONE), "transformers16": lambda: transformers(16)}
    if args.vllm:
        variables, notes = environment(args.vllm)
        command = [args.vllm, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), *_flags(VLLM)]
        found |= {
            "vllm": lambda: Offline(
                lambda: OfflineProcess(args.vllm, "vllm_offline.py", str(model), VLLM, variables),
                lambda _: POOL_BYTES),
            "vllm_http": lambda: Server(PeerServer(command, variables))}
    if args.llama_server:
        found["llama"] = lambda: Server(_llama(args.llama_server))
    return found, notes


def _llama(program: str) -> Serving:
    return PeerServer([program, "-m", str(GGUF), "-np", str(LLAMA_SLOTS), "-c",
                       str(LLAMA_CONTEXT), "-t", str(THREADS)])


def _flags(options: dict[str, Any]) -> list[str]:
    """Command-line flags, which have the same names on both servers."""
    flags = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return flags
