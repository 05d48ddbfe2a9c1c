"""copy_blocks: each block arrives whole and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvarto.kernels import copy_blocks

# Elements of a block: one, odd sizes that end between cache lines, and sizes that are streamed past the caches.
SIZES = [1, 37, 4096, 99_991, 700_003]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_named_blocks_arrive_and_the_others_stay(size: int, threads: int, dtype: torch.dtype) -> None:
    torch.set_num_threads(threads)
    source = torch.randint(1, 200, (9, size)).to(dtype)
    destination = torch.zeros(12, size, dtype=dtype)
    pairs = [(8, 0), (0, 11), (3, 4), (3, 5), (7, 2), (1, 9)]
    copy_blocks(source, destination, pairs)
    expected = torch.zeros_like(destination)
    for from_block, to_block in pairs:
        expected[to_block] = source[from_block]
    assert torch.equal(destination, expected)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("threads", [1, 2])
def test_one_large_block_is_shared_among_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    pool = torch.randn(3, 2_000_003)
    others = pool[[0, 1]]
    copy_blocks(pool, pool, [(1, 2)])
    assert torch.equal(pool[2], pool[1])
    assert torch.equal(pool[[0, 1]], others)


@pytest.mark.usefixtures("backend")
def test_blocks_of_any_shape_and_stride_are_copied_in_place() -> None:
    wide = torch.randn(5, 3, 2, 8, 7)
    source, destination = wide[:, 1:, :, :, :], torch.zeros(10, 2, 2, 8, 7)[::2]
    assert not source.is_contiguous() and not destination.is_contiguous()
    copy_blocks(source, destination, np.array([[4, 1], [0, 4]]))
    assert torch.equal(destination[[1, 4]], source[[4, 0]])
    assert not destination[[0, 2, 3]].any()


@pytest.mark.usefixtures("backend")
def test_no_pairs_copy_nothing() -> None:
    destination = torch.zeros(2, 4)
    copy_blocks(torch.ones(2, 4), destination, [])
    copy_blocks(torch.ones(2, 4), destination, np.empty((0, 2), np.int64))
    assert not destination.any()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("pair", [(-1, 0), (4, 0), (0, -1), (0, 3)])
def test_block_outside_its_tensor_is_refused_before_anything_is_copied(pair: tuple[int, int]) -> None:
    destination = torch.zeros(3, 4)
    with pytest.raises(ValueError, match="pair 1 names a block outside"):
        copy_blocks(torch.ones(4, 4), destination, [(3, 2), pair])
    assert not destination.any()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("destination", "pairs", "error", "message"),
    [
        (torch.zeros(3, 4, 2, dtype=torch.float16), [(0, 0)], TypeError, "destination must be torch.float32"),
        (torch.zeros(3, 2, 4), [(0, 0)], ValueError, "destination must have shape"),
        (torch.zeros(3, 4), [(0, 0)], ValueError, "destination must have shape"),
        (torch.zeros(3, 4, 2, device="meta"), [(0, 0)], ValueError, "destination is on meta"),
        (torch.zeros(3, 2, 4).transpose(1, 2), [(0, 0)], ValueError, "destination must have dense blocks"),
        (torch.tensor(0.0), [(0, 0)], ValueError, "destination must be .* got a scalar"),
        (torch.zeros(3, 4, 2), [(0.5, 0)], TypeError, "pairs must be int64"),
        (torch.zeros(3, 4, 2), np.zeros((1, 2), np.int32), TypeError, "pairs must be int64"),
        (torch.zeros(3, 4, 2), [(0, 0, 0)], ValueError, "pairs must be"),
    ],
)
def test_bad_input_is_refused_by_name(
    destination: torch.Tensor, pairs: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        copy_blocks(torch.zeros(3, 4, 2), destination, pairs)  # type: ignore[arg-type]
