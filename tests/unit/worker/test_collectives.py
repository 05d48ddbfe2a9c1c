"""Three real processes, over shared memory and over gloo, each told what to do on its standard input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kvarto.protos.errors import ResourcesError, UnavailableError
from kvarto.worker.collectives import SingleRank, connect, serve_store, thread_group

WORLD = 3
SCRIPT = """
import json, sys, time
import torch
torch.set_num_threads(1)
from kvarto.protos.errors import UnavailableError
from kvarto.worker.collectives import connect, serve_store
rank, world = int(sys.argv[1]), int(sys.argv[2])
if rank == 0:
    store, port = serve_store("127.0.0.1")
print(port if rank == 0 else 0, flush=True)
comm = connect(rank, world, "127.0.0.1", int(sys.stdin.readline()), torch.device("cpu"), timeout_s=4.0)

def bits(tensor):
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16).tolist()

def own(rank, dtype, rows=7):
    return torch.randn(rows, 33, generator=torch.Generator().manual_seed(rank)).to(dtype)

report = {"rank": comm.rank, "world_size": comm.world_size, "name": comm.name}
for name in ("float32", "bfloat16", "float16"):
    dtype = getattr(torch, name)
    tensor = own(rank, dtype)
    result = comm.all_reduce(tensor)
    report[name] = bits(result)
    report[name + "_in_place"] = result is tensor
    first = comm.all_reduce(own(rank, dtype)[:1].clone())
    report[name + "_first_row"] = bits(first)
report["gathered"] = comm.all_gather_rows(torch.full((2, 2), rank)).tolist()
report["broadcast"] = comm.broadcast(torch.full((2,), rank), src=1).tolist()
print(json.dumps(report), flush=True)
sys.stdin.readline()
start = time.monotonic()
if rank != 1:  # rank 1 lives, and does not take part
    try:
        comm.all_reduce(torch.ones(3))
        print("no error", flush=True)
    except UnavailableError as error:
        comm.close()
        print(json.dumps({"seconds": time.monotonic() - start, "message": error.message}), flush=True)
sys.stdin.readline()
"""


@pytest.fixture(scope="module", params=["shared memory", "gloo"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def ranks(name):
    environment = {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path)}
    # One rank without native kernels suffices.
    kernels = [{"KVARTO_KERNELS": "reference"} if name == "gloo" and rank == 1 else {} for rank in range(WORLD)]
    processes = [subprocess.Popen([sys.executable, "-c", SCRIPT, str(rank), str(WORLD)],
                                  env=environment | kernels[rank], text=True, stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE) for rank in range(WORLD)]
    ports = [line(process) for process in processes]
    for process in processes:
        tell(process, ports[0])
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def reports(ranks):
    return [json.loads(line(process)) for process in ranks]


def line(process) -> str:
    return process.stdout.readline().strip()


def tell(process, text: str) -> None:
    process.stdin.write(text + "\n")
    process.stdin.flush()


def own(rank: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(7, 33, generator=torch.Generator().manual_seed(rank)).to(dtype)


def test_ranks_of_one_host_share_memory_where_the_kernels_are_native(reports, name):
    assert [report["name"] for report in reports] == [name] * WORLD


@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16", "float16"])
def test_all_reduce_gives_the_same_bits_on_every_rank(reports, dtype_name):
    assert reports[0][dtype_name] == reports[1][dtype_name] == reports[2][dtype_name]
    assert all(report[f"{dtype_name}_in_place"] for report in reports)


@pytest.mark.parametrize("dtype_name", ["bfloat16", "float16"])
def test_half_precision_is_summed_in_float32(reports, dtype_name):
    dtype = getattr(torch, dtype_name)
    exact = sum(own(rank, dtype).float() for rank in range(WORLD)).to(dtype)
    assert torch.equal(torch.tensor(reports[0][dtype_name], dtype=torch.int16).view(dtype), exact)


@pytest.mark.parametrize("dtype_name", ["float32", "bfloat16", "float16"])
def test_bits_of_a_row_do_not_depend_on_the_other_rows(reports, dtype_name):
    assert reports[0][dtype_name][:1] == reports[0][f"{dtype_name}_first_row"]


def test_all_gather_rows_and_broadcast(reports):
    for report in reports:
        assert report["gathered"] == [[[rank] * 2] * 2 for rank in range(WORLD)]
        assert report["broadcast"] == [1, 1]


def test_a_rank_that_does_not_answer_ends_in_an_error_at_the_deadline(ranks, reports):
    assert len(reports) == WORLD
    for process in ranks:
        tell(process, "")
    for process in (ranks[0], ranks[2]):
        answer = json.loads(line(process))
        assert answer["seconds"] < 10
        assert "the worker group must be started again" in answer["message"]


def test_a_group_that_does_not_come_together_is_an_error():
    store, port = serve_store("127.0.0.1")
    with pytest.raises(UnavailableError, match="rank 0 of 2 could not join"):
        connect(0, 2, "127.0.0.1", port, torch.device("cpu"), timeout_s=0.5)
    del store


def test_a_port_in_use_is_an_error():
    store, port = serve_store("127.0.0.1")
    with pytest.raises(ResourcesError, match=f"127.0.0.1:{port}"):
        serve_store("127.0.0.1", port)
    del store


@pytest.fixture(params=["auto", "reference"])
def threads(request, monkeypatch):
    """Three ranks that are threads; a function that lets each do something with its own."""
    monkeypatch.setenv("KVARTO_KERNELS", request.param)
    group = thread_group(WORLD, "cpu", timeout_s=2.0)

    def together(work):
        with ThreadPoolExecutor(WORLD) as pool:
            return list(pool.map(work, group))

    return together


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_threads_sum_in_float32_and_gather_and_broadcast(threads, dtype):
    exact = sum(own(rank, dtype).float() for rank in range(WORLD)).to(dtype)
    assert all(torch.equal(found, exact) for found in threads(lambda comm: comm.all_reduce(own(comm.rank, dtype))))
    gathered = torch.stack([own(rank, dtype) for rank in range(WORLD)])
    assert all(torch.equal(found, gathered)
               for found in threads(lambda comm: comm.all_gather_rows(own(comm.rank, dtype))))
    for found in threads(lambda comm: comm.broadcast(own(comm.rank, dtype), src=2)):
        assert torch.equal(found, own(2, dtype))


def test_threads_whose_peer_leaves_end_in_an_error(threads):
    def work(comm):
        if comm.rank == 1:
            comm.close()
            return
        with pytest.raises(UnavailableError):
            comm.all_reduce(torch.ones(3))

    threads(work)


def test_single_rank_moves_nothing():
    comm, tensor = SingleRank(), torch.ones(2)
    assert comm.all_reduce(tensor) is tensor
    assert comm.broadcast(tensor) is tensor
    assert comm.all_gather_rows(tensor).shape == (1, 2)
