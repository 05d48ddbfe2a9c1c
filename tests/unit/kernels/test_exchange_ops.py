"""Collectives over shared memory, by threads of this process."""

from __future__ import annotations

import ctypes
import mmap
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kvarto.kernels import exchange_ops as ops
from kvarto.kernels.backends import ExchangeError, native_library
from kvarto.kernels.exchange_ops import Exchange, region_bytes

pytestmark = pytest.mark.skipif(not ops.supported(), reason="needs the native kernels")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_group(world_size: int, timeout_s: float = 20.0) -> list[Exchange]:
    region = mmap.mmap(-1, region_bytes(world_size))
    return [Exchange(region, rank, world_size, timeout_s) for rank in range(world_size)]


def together(work, *per_rank) -> list:
    """`work(*arguments)` of every rank, at once."""
    with ThreadPoolExecutor(len(per_rank[0])) as pool:
        return list(pool.map(work, *per_rank))


def parts_of(world_size: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * 10.0 ** rank).to(dtype) for rank in range(world_size)]


def sum_in_rank_order(parts: list[torch.Tensor]) -> torch.Tensor:
    """By numpy: float32 additions in rank order, rounded once."""
    total = parts[0].float().numpy().copy()
    for part in parts[1:]:
        total = total + part.float().numpy()
    return torch.from_numpy(total).to(parts[0].dtype)


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (1, 576), (3, 33), (7, 577), (500, 576), (4100, 65)], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_reduce_sums_in_rank_order_on_every_rank(native_backend, dtype, world_size, shape):
    parts = parts_of(world_size, shape, dtype)
    expected = sum_in_rank_order(parts)
    exact = sum(part.double() for part in parts)
    for result in together(Exchange.all_reduce, make_group(world_size), [part.clone() for part in parts]):
        assert torch.equal(result, expected)
        bound = (world_size * 2.0**-24 + torch.finfo(dtype).eps / 2) * sum(part.double().abs() for part in parts)
        assert ((result.double() - exact).abs() <= bound + 1e-7).all()


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_row_depend_on_no_other_row(dtype, num_threads):
    def all_reduce(exchange, part):
        torch.set_num_threads(num_threads)
        return exchange.all_reduce(part.clone())

    before = torch.get_num_threads()
    parts = parts_of(3, (2000, 97), dtype)
    group = make_group(3)
    try:
        whole = together(all_reduce, group, parts)[0]
        for begin, end in ((0, 1), (1999, 2000), (17, 18), (300, 1700)):
            some = together(all_reduce, group, [part[begin:end] for part in parts])[0]
            assert torch.equal(some, whole[begin:end])
    finally:
        torch.set_num_threads(before)


def test_nothing_is_written_behind_the_message():
    for dim in (1, 7, 16, 31, 33):
        buffers = [torch.full((3 * dim,), float(rank)) for rank in range(2)]
        together(Exchange.all_reduce, make_group(2), [buffer[dim:2 * dim] for buffer in buffers])
        for rank, buffer in enumerate(buffers):
            assert buffer.tolist() == [rank] * dim + [1] * dim + [rank] * dim


@pytest.mark.parametrize("num_bytes", [0, 1, 63, ops.SLOT_BYTES, ops.SLOT_BYTES + 1, 5 * ops.SLOT_BYTES + 77])
def test_all_gather_and_broadcast_move_bytes_of_any_number(num_bytes):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=generator) for _ in range(3)]
    group = make_group(3)
    for gathered in together(Exchange.all_gather, group, parts):
        assert torch.equal(gathered, torch.stack(parts))
    for tensor in together(Exchange.broadcast, group, [part.clone() for part in parts], [2] * 3):
        assert torch.equal(tensor, parts[2])


def test_shapes_and_dtypes_come_back():
    group = make_group(2)
    for shape, dtype in (((2, 3), torch.int64), ((), torch.float64), ((4, 0), torch.bool)):
        parts = [torch.ones(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)]
        for gathered in together(Exchange.all_gather, group, parts):
            assert gathered.dtype == dtype
            assert torch.equal(gathered, torch.stack(parts))


def test_a_recorded_call_is_made_again_with_another_number_of_tokens():
    group, parts = make_group(2), [torch.ones(9, 5), torch.full((9, 5), 2.0)]
    calls = [exchange.all_reduce_call(part) for exchange, part in zip(group, parts, strict=True)]

    def replay(exchange, call, num_tokens):
        call.num_tokens = num_tokens
        assert native_library().exchange.all_reduce(call, ctypes.c_int64()) == 0

    for num_tokens in (4, 9):
        together(replay, group, calls, [num_tokens] * 2)
    # The first four rows were 3 on both ranks after the first call.
    assert all(part[:, 0].tolist() == [6] * 4 + [3] * 5 for part in parts)


def test_the_count_of_pieces_may_wrap():
    region = mmap.mmap(-1, region_bytes(2))
    header = (region_bytes(2) - 4 * ops.SLOT_BYTES) // 2
    for rank in range(2):
        struct.pack_into("<I", region, rank * header, 2**32 - 8)
    group = [Exchange(region, rank, 2, 20.0) for rank in range(2)]
    for turn in range(10):
        parts = [torch.tensor([turn]), torch.tensor([-turn])]
        for gathered in together(Exchange.all_gather, group, parts):
            assert gathered.tolist() == [[turn], [-turn]]
    assert struct.unpack_from("<I", region, 0)[0] == 12


def test_a_late_rank_ends_in_an_error_at_the_deadline_and_everywhere():
    first, second, third = make_group(3, timeout_s=0.5)
    start = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second.all_reduce, torch.ones(1))
        with pytest.raises(ExchangeError, match=r"rank 2 did not come in time|another rank left"):
            first.all_reduce(torch.ones(1))
        with pytest.raises(ExchangeError):
            waiting.result()
    assert 0.4 < time.monotonic() - start < 5
    with pytest.raises(ExchangeError, match="another rank left or gave up"):
        third.all_reduce(torch.ones(1))


def test_ranks_that_sleep_are_woken_by_an_abort():
    group = make_group(3)
    ended = []

    def wait(exchange):
        with pytest.raises(ExchangeError, match="another rank left or gave up"):
            exchange.all_reduce(torch.ones(1))
        ended.append(time.monotonic())

    threads = [threading.Thread(target=wait, args=(exchange,)) for exchange in group[:2]]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert not ended
    aborted = time.monotonic()
    group[2].abort()
    for thread in threads:
        thread.join()
    assert max(ended) - aborted < 0.3


def test_ranks_that_sleep_are_woken_by_the_last_to_come():
    first, second = make_group(2)
    waits = []
    for _ in range(15):
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(lambda: (first.all_reduce(torch.ones(1)), time.monotonic())[1])
            time.sleep(0.03)
            came = time.monotonic()
            second.all_reduce(torch.ones(1))
            waits.append(waiting.result() - came)
    # A sleeper that nobody wakes looks by itself every 20 ms.
    assert sorted(waits)[7] < 0.004


def test_a_collective_that_all_have_joined_ends_well_though_one_leaves_then():
    for _ in range(200):
        group = make_group(2)

        def leave(exchange):
            result = exchange.all_reduce(torch.ones(3))
            exchange.abort()
            return result

        first, second = together(lambda work, exchange: work(exchange),
                                 [leave, lambda exchange: exchange.all_reduce(torch.ones(3))], group)
        assert first.tolist() == second.tolist() == [2, 2, 2]


@pytest.mark.parametrize(("one", "other"), [
    (lambda exchange: exchange.all_reduce(torch.ones(4)), lambda exchange: exchange.all_reduce(torch.ones(5))),
    (lambda exchange: exchange.all_reduce(torch.ones(4)),
     lambda exchange: exchange.all_reduce(torch.ones(8, dtype=torch.float16))),
    (lambda exchange: exchange.all_reduce(torch.ones(4)), lambda exchange: exchange.all_gather(torch.ones(4))),
    (lambda exchange: exchange.broadcast(torch.ones(4), 0), lambda exchange: exchange.broadcast(torch.ones(4), 1)),
], ids=["size", "dtype", "kind", "source"])
def test_ranks_in_different_collectives_are_told(one, other):
    def errors(work, exchange):
        with pytest.raises(ExchangeError) as raised:
            work(exchange)
        return str(raised.value)

    found = together(errors, [one, other], make_group(2))
    assert any("is in another collective" in message for message in found), found


def test_bad_input_is_refused_before_others_are_met(monkeypatch):
    exchange = make_group(2)[0]
    with pytest.raises(TypeError, match="float32, bfloat16 or float16"):
        exchange.all_reduce(torch.ones(2, dtype=torch.float64))
    for refused in (exchange.all_reduce, exchange.all_gather, lambda tensor: exchange.broadcast(tensor, 0)):
        with pytest.raises(ValueError, match="contiguous"):
            refused(torch.ones(4, 4).t())
    with pytest.raises(ValueError, match="rank 2 of 2"):
        exchange.broadcast(torch.ones(1), 2)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        Exchange(mmap.mmap(-1, region_bytes(2)), 2, 2, 1.0)
    with pytest.raises(ValueError, match="the region has 4096"):
        Exchange(mmap.mmap(-1, 4096), 0, 2, 1.0)
    with pytest.raises(ValueError, match="1 descriptors for 2 ranks"):
        Exchange(mmap.mmap(-1, region_bytes(2)), 0, 2, 1.0, [-1])


def test_the_reference_backend_has_none(monkeypatch):
    monkeypatch.setenv("KVARTO_KERNELS", "reference")
    assert not ops.supported()
