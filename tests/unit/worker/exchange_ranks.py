"""Ranks as processes, each doing what a script says with a communicator `comm`."""

from __future__ import annotations

import os
import subprocess
import sys

PRELUDE = """
import json, random, sys, time
import torch
torch.set_num_threads(1)
from kvarto.protos.errors import UnavailableError
from kvarto.worker.collectives import connect
rank, world, port, timeout_s = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
comm = connect(rank, world, "127.0.0.1", port, torch.device("cpu"), timeout_s)
assert comm.name == "shared memory"
"""


def start(script: str, world_size: int, port: int, timeout_s: float) -> list[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path)}
    return [subprocess.Popen(
        [sys.executable, "-c", PRELUDE + script, str(rank), str(world_size), str(port), str(timeout_s)],
        env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for rank in range(world_size)]


def line(process: subprocess.Popen[str]) -> str:
    """The next that it prints; empty once it has ended."""
    assert process.stdout is not None
    return process.stdout.readline().strip()
