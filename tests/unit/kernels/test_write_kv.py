"""write_kv: each row goes to its slot and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from kvarto.kernels import write_kv


def poisoned_cache(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((6, 3, 2, 2, 16, 24), torch.nan, dtype=dtype)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_land_in_their_slots_and_nowhere_else(dtype: torch.dtype) -> None:
    cache = poisoned_cache(dtype)
    slots = torch.tensor([5 * 16 + 15, 0, 2 * 16 + 7, 17])
    fused = torch.randn(4, 100).to(dtype)  # K and V as slices of one projection
    key, value = fused[:, :48].unflatten(1, (2, 24)), fused[:, 50:98].unflatten(1, (2, 24))
    write_kv(key, value, cache, 2, slots)
    for token, slot in enumerate(slots.tolist()):
        for side, rows in enumerate((key, value)):
            written = cache[slot // 16, 2, side, :, slot % 16]
            assert torch.equal(written, rows[token])
            written.fill_(torch.nan)
    assert cache.isnan().all()


@pytest.mark.usefixtures("backend")
def test_many_rows_are_written_by_many_threads() -> None:
    cache = torch.zeros(512, 1, 2, 2, 16, 64)
    slots = torch.randperm(512 * 16)[:4000]
    key, value = torch.randn(2, 4000, 2, 64)
    torch.set_num_threads(2)
    write_kv(key, value, cache, 0, slots)
    assert torch.equal(cache[slots // 16, 0, 0, :, slots % 16], key)
    assert torch.equal(cache[slots // 16, 0, 1, :, slots % 16], value)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("slot", [-1, 6 * 16])
def test_slot_outside_the_cache_is_refused_before_anything_is_written(slot: int) -> None:
    cache = poisoned_cache()
    rows = torch.zeros(2, 2, 24)
    with pytest.raises(ValueError, match="slot of token 1"):
        write_kv(rows, rows, cache, 0, torch.tensor([3, slot]))
    assert cache.isnan().all()


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("key", "slots", "error", "message"),
    [
        (torch.zeros(2, 1, 24), torch.tensor([0, 1]), ValueError, "key must have shape"),
        (torch.zeros(3, 2, 24), torch.tensor([0, 1]), ValueError, "key must have shape"),
        (torch.zeros(2, 2, 24, dtype=torch.float16), torch.tensor([0, 1]), TypeError, "key must be torch.float32"),
        (torch.zeros(2, 24, 2).transpose(1, 2), torch.tensor([0, 1]), ValueError, "key must have dense"),
        (torch.zeros(2, 2, 24), torch.tensor([0, 1], dtype=torch.int32), TypeError, "slot_mapping must be torch.int64"),
        (torch.zeros(2, 2, 24), torch.tensor([[0, 1]]), ValueError, "slot_mapping must have shape"),
    ],
)
def test_bad_input_is_refused_by_name(
    key: torch.Tensor, slots: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write_kv(key, torch.zeros(2, 2, 24), poisoned_cache(), 0, slots)
