"""The backend "triton": when it is chosen, that the public ops run on it, and that nothing needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from kvarto.kernels import available_backends, backend, copy_blocks, linear, pack_linear, paged_attention, write_kv
from kvarto.kernels.triton import available

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.strip()


def test_kernels_work_where_triton_cannot_be_imported() -> None:
    code = ("import sys; sys.modules['triton'] = None\n"
            "from kvarto.kernels import available_backends, backend\n"
            "print(available_backends('cuda'), backend('cuda'), backend() in available_backends())")
    assert run(code) == "('torch-reference',) torch-reference True"


def test_kernels_do_not_import_triton_before_it_is_needed() -> None:
    assert run("import sys, kvarto.kernels; print('triton' in sys.modules)") == "False"


def test_a_gpu_gets_triton_and_a_processor_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(available, "installed", lambda: True)
    monkeypatch.delenv("KVARTO_KERNELS", raising=False)
    assert backend("cuda") == "triton"
    assert backend("cpu") == available_backends()[-1] != "triton"


def test_triton_on_a_processor_is_refused_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setenv("KVARTO_KERNELS", "triton")
    with pytest.raises(ValueError, match=r"KVARTO_KERNELS='triton'.*torch-reference"):
        backend("cpu")


@pytest.mark.skipif(not available.runs_on(DEVICE), reason="needs Triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_public_ops_agree_with_the_reference(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    key, value = torch.randn(2, 40, 2, 64, device=DEVICE).to(dtype)
    query = torch.randn(9, 4, 64, device=DEVICE).to(dtype)
    weight, bias = torch.randn(24, 64, device=DEVICE).to(dtype), torch.randn(24, device=DEVICE)
    tables = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32, device=DEVICE)
    starts, kv_lens = (torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, 1, 9], [23, 17]))
    slots = torch.cat([torch.arange(48, 64), torch.arange(16, 23), torch.arange(17)]).to(DEVICE)

    def ops() -> list[torch.Tensor]:
        cache, copied = (torch.zeros(5, 2, 2, 2, 16, 64, dtype=dtype, device=DEVICE) for _ in range(2))
        write_kv(key, value, cache, 1, slots)
        copy_blocks(cache, copied, [(3, 4), (0, 1)])
        attended = paged_attention(query, cache, 1, tables, starts, kv_lens, 0.125)
        return [cache, copied, attended, linear(query.flatten(0, 1), pack_linear(weight, bias))]

    monkeypatch.setenv("KVARTO_KERNELS", "triton")
    found = ops()
    monkeypatch.setenv("KVARTO_KERNELS", "reference")
    for ours, expected in zip(found, ops(), strict=True):
        tolerance = 4 * torch.finfo(dtype).eps
        assert torch.allclose(ours.float(), expected.float(), rtol=tolerance, atol=tolerance * 8)
