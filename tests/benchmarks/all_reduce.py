"""Microseconds per all-reduce of [rows, dim] bfloat16 between ranks of one thread: shared memory and Gloo by turns.

    python tests/benchmarks/all_reduce.py --world-size 2
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
import warnings

import torch
from torch.distributed import TCPStore

from kvarto.worker.collectives import Communicator, TorchCommunicator, connect, serve_store

ROWS = (1, 16, 64, 256, 1024)
NUM_CALLS = {"shared memory": 2000, "gloo": 300}
TIMEOUT_S = 60.0


def measure(comm: Communicator, rows: int, dim: int) -> tuple[float, float]:
    """Median and 90th percentile."""
    tensor, seconds = torch.zeros(rows, dim, dtype=torch.bfloat16), []
    for _ in range(50 + NUM_CALLS[comm.name]):
        started = time.perf_counter()
        comm.all_reduce(tensor)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[50:]) * 1e6, statistics.quantiles(seconds[50:], n=10)[8] * 1e6


def run(rank: int, world_size: int, port: int, dim: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cpu, store = torch.device("cpu"), TCPStore("127.0.0.1", port, is_master=False)
    comms = [connect(rank, world_size, "127.0.0.1", port, cpu, TIMEOUT_S),
             TorchCommunicator(store, rank, world_size, cpu, TIMEOUT_S)]
    for rows in ROWS:
        for comm in comms:
            median, late = measure(comm, rows, dim)
            if rank == 0:
                print(f"{rows:5} rows  {comm.name:14} median {median:7.1f} us  p90 {late:7.1f} us", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--dim", type=int, default=576)
    arguments = parser.parse_args()
    store, port = serve_store("127.0.0.1")
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=run, args=(rank, arguments.world_size, port, arguments.dim))
             for rank in range(arguments.world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    del store


if __name__ == "__main__":
    main()
