"""Ranks that are processes and share memory: many collectives, late ranks, ranks that are killed, stopped or leave."""

from __future__ import annotations

import json
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from kvarto.kernels.exchange_ops import supported
from kvarto.worker.collectives import region as region_module
from kvarto.worker.collectives import serve_store

from .exchange_ranks import line, start

pytestmark = pytest.mark.skipif(not supported(), reason="needs the native kernels")

# All ranks draw the same calls; each knows what every rank gives, and so what has to come back.
RANDOM_CALLS = """
calls, naps = random.Random(0), random.Random(rank + 1)
pool = torch.randn(world, 700_000, generator=torch.Generator().manual_seed(0)) * 100
for turn in range(3000):
    kind, size = calls.choice("rrrgb"), int(10 ** calls.uniform(0, 5.8 if turn % 50 == 0 else 3.5))
    begin, src = calls.randrange(700_000 - size + 1), calls.randrange(world)
    dtype = calls.choice([torch.float32, torch.bfloat16, torch.float16])
    parts = (pool[:, begin:begin + size]).to(dtype)
    if naps.random() < 0.02:
        time.sleep(naps.random() * 0.004)
    own = parts[rank].clone()
    if kind == "r":
        total = parts[0].float()
        for part in parts[1:]:
            total = total + part.float()
        assert torch.equal(comm.all_reduce(own), total.to(dtype)), (turn, rank)
    elif kind == "g":
        assert torch.equal(comm.all_gather_rows(own), parts), (turn, rank)
    else:
        assert torch.equal(comm.broadcast(own, src), parts[src]), (turn, rank)
print("done", flush=True)
"""

# Works until an error, and tells how long the call that failed took.
UNTIL_AN_ERROR = """
for turn in range(10**9):
    if turn == 300:
        print("busy", flush=True)
    started = time.monotonic()
    try:
        comm.all_reduce(torch.ones(64, 576))
    except UnavailableError as error:
        print(json.dumps({"seconds": time.monotonic() - started, "message": error.message}), flush=True)
        break
    if LEAVES:
        comm.close()
        break
sys.stdin.readline()
"""


@pytest.fixture
def launch():
    processes = []

    def launch(script, world_size, timeout_s):
        store, port = serve_store("127.0.0.1")
        processes.append((store, start(script, world_size, port, timeout_s)))
        return processes[-1][1]

    yield launch
    for _, group in processes:
        for process in group:
            process.kill()
            process.communicate()


def open_regions() -> list[str]:
    """Regions of any exchange that some process still has open or mapped, and files in /dev/shm."""
    found = [str(path) for path in Path("/dev/shm").iterdir() if "kvarto" in path.name]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if "kvarto-exchange" in (process / "maps").read_text():
                found.append(str(process))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("world_size", [2, 5])
def test_thousands_of_collectives_of_ranks_that_come_late_at_random(launch, world_size):
    ranks = launch(RANDOM_CALLS, world_size, 60)
    assert [line(process) for process in ranks] == ["done"] * world_size


def test_a_killed_rank_is_noticed_long_before_the_deadline_and_leaves_nothing(launch):
    ranks = launch("LEAVES = False" + UNTIL_AN_ERROR, 3, 60)
    assert [line(process) for process in ranks] == ["busy"] * 3
    pids = {f"/proc/{process.pid}" for process in ranks}
    assert pids <= set(open_regions())
    ranks[0].send_signal(signal.SIGKILL)
    for process in ranks[1:]:
        answer = json.loads(line(process))
        assert answer["seconds"] < 5
        assert "rank 0 died" in answer["message"] or "another rank left" in answer["message"]
    for process in ranks:
        process.kill()
        process.wait()
    assert not pids & set(open_regions())
    assert not [path for path in open_regions() if path.startswith("/dev/shm")]


def test_a_stopped_rank_ends_in_an_error_at_the_deadline(launch):
    ranks = launch("LEAVES = False" + UNTIL_AN_ERROR, 2, 1.5)
    assert [line(process) for process in ranks] == ["busy"] * 2
    ranks[1].send_signal(signal.SIGSTOP)
    answer = json.loads(line(ranks[0]))
    assert 1.4 < answer["seconds"] < 6
    assert "rank 1 did not come in time" in answer["message"]
    # Once it goes on it learns that the others have given up.
    ranks[1].send_signal(signal.SIGCONT)
    assert "another rank left or gave up" in json.loads(line(ranks[1]))["message"]


def test_a_rank_that_closes_makes_the_others_fail_at_once(launch):
    ranks = launch("LEAVES = rank == 1" + UNTIL_AN_ERROR, 3, 60)
    for process in (ranks[0], ranks[2]):
        answer = json.loads(line(process))
        assert answer["seconds"] < 1
        assert "another rank left" in answer["message"]


def _elsewhere() -> str:
    return f"elsewhere {os.urandom(4).hex()}"


def _refused(*_: object) -> None:
    raise PermissionError("may not be opened")


@pytest.mark.parametrize(("attribute", "value", "message"), [
    ("_place", _elsewhere, "the ranks are not on one host"), ("_map", _refused, "rank 0: may not be opened"),
], ids=["hosts", "permissions"])
def test_ranks_that_cannot_share_memory_all_find_the_same_reason(monkeypatch, attribute, value, message):
    monkeypatch.setattr(region_module, attribute, value)
    store, port = serve_store("127.0.0.1")

    def reason(rank):
        with pytest.raises(region_module.NotSharedError) as raised:
            region_module.open_exchange(TCPStore("127.0.0.1", port, is_master=False), rank, 2, 20.0)
        return str(raised.value)

    with ThreadPoolExecutor(2) as pool:
        reasons = list(pool.map(reason, range(2)))
    assert reasons[0] == reasons[1]
    assert reasons[0].startswith(message)
    del store
