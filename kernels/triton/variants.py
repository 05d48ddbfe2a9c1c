"""The named kernel variants that are compiled ahead of time, with the traffic that each is estimated to cause.

They are launched as `launch.py` launches them: same constants, same configuration, and the same arguments known to be
multiples of 16. Workloads: decode of one sequence of 32,768 rows; a prefill chunk of 2,048 tokens at the end of 4,096
rows; 32 query heads, as many KV heads as the group leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .cache import copy_blocks_kernel, write_kv_kernel
from .configs import COPY_CHUNK_WORDS, MAX_DECODE_HEADS, WRITE_CHUNK, TileConfig, config_for
from .decode import decode_kernel, reduce_kernel
from .launch import CAUSAL, Mask, even_share, splits_for
from .prefill import prefill_kernel
from .tiles import padded_dim

TARGETS = {"cuda-80": ("cuda", 80, 32), "cuda-90": ("cuda", 90, 32), "cuda-100": ("cuda", 100, 32),
           "hip-gfx942": ("hip", "gfx942", 64)}
"""Name -> backend, architecture and threads of a warp."""

NUM_HEADS = 32
DECODE_ROWS, PREFILL_ROWS, PREFILL_TOKENS = 32_768, 4_096, 2_048
ITEM_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
WINDOWED = Mask(window=4096, num_sinks=4, soft_cap=50.0)


@dataclass(frozen=True, slots=True)
class Variant:
    """`moved_per_needed`: bytes that the programs load and store over bytes that have to be read and written once.

    What exceeds 1 is served by the L2 cache as far as it reaches.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    signature: dict[str, str]
    num_warps: int
    num_stages: int
    moved_per_needed: float


def variants(target: str) -> list[Variant]:
    """All of them, as one of `TARGETS` runs them."""
    backend, arch, _ = TARGETS[target]

    def config(kernel: str, dtype: str, head_dim: int) -> TileConfig:
        return config_for(kernel, backend, str(arch), padded_dim(head_dim), ITEM_BYTES[dtype])

    shapes = [(dtype, dim, 4, 16, CAUSAL) for dtype in ("bf16", "fp32") for dim in (64, 80, 96, 128, 256)]
    shapes += [("fp16", 128, 4, 16, CAUSAL), ("bf16", 128, 4, 128, CAUSAL), ("bf16", 128, 1, 16, CAUSAL),
               ("bf16", 64, 32, 16, CAUSAL), ("bf16", 256, 32, 16, CAUSAL), ("fp32", 256, 32, 16, CAUSAL),
               ("bf16", 128, 4, 16, WINDOWED)]
    found = [_decode(*shape, config("decode", *shape[:2])) for shape in shapes]
    found += [_reduce(dtype, dim, config("decode", dtype, dim)) for dtype, dim in (("bf16", 128), ("fp32", 256))]
    found += [_prefill(*shape, config("prefill", *shape[:2])) for shape in shapes]
    found += [_write("bf16", 128), _write("bf16", 80), _write("fp32", 128), _copy()]
    return found


def _decode(dtype: str, head_dim: int, group: int, block_size: int, mask: Mask, config: TileConfig) -> Variant:
    heads = even_share(group, MAX_DECODE_HEADS)
    num_splits = splits_for(DECODE_ROWS)
    rows = DECODE_ROWS if mask.window is None else mask.window + mask.num_sinks
    rows_bytes = 2 * rows * head_dim * ITEM_BYTES[dtype]  # of one KV head
    queries_bytes = group * head_dim * ITEM_BYTES[dtype]
    partial_bytes = group * num_splits * (head_dim + 1) * 4
    ids_bytes = 4 * (rows // config.tile_n if block_size % config.tile_n == 0 else rows)
    num_tiles = -(-group // heads)
    moved = num_tiles * (rows_bytes + ids_bytes) + num_splits * queries_bytes + partial_bytes
    pointers = dict(query_ptr=dtype, key_ptr=dtype, value_ptr=dtype, block_tables_ptr="i32", query_start_loc_ptr="i32",
                    kv_lens_ptr="i32", partial_ptr="fp32", lse_ptr="fp32")
    return _variant(
        "decode", decode_kernel, pointers, _shape(dtype, head_dim, group, block_size, mask),
        dict(query_stride="i32", block_stride="i32", table_stride="i32", scale="fp32"),
        dict(GROUP=group, HEADS=heads, BLOCK_SIZE=block_size, HEAD_DIM=head_dim, TILE_N=config.tile_n,
             NUM_SPLITS=num_splits, WINDOW=mask.window, NUM_SINKS=mask.num_sinks, SOFT_CAP=mask.soft_cap),
        config.num_warps, config.num_stages, moved / (rows_bytes + 2 * queries_bytes))


def _reduce(dtype: str, head_dim: int, config: TileConfig) -> Variant:
    num_splits = splits_for(DECODE_ROWS)
    pointers = dict(partial_ptr="fp32", lse_ptr="fp32", out_ptr=dtype, query_start_loc_ptr="i32", kv_lens_ptr="i32")
    return _variant(
        "reduce", reduce_kernel, pointers, f"{dtype} d{head_dim}", {},
        dict(HEAD_DIM=head_dim, TILE_N=config.tile_n, NUM_SPLITS=num_splits, WINDOW=None, NUM_SINKS=0), 4, 3, 1.0)


def _prefill(dtype: str, head_dim: int, group: int, block_size: int, mask: Mask, config: TileConfig) -> Variant:
    heads = even_share(group, config.rows)
    block_q, num_kv_heads = config.rows // heads, NUM_HEADS // group
    sees = [min(end, PREFILL_ROWS if mask.window is None else mask.window + block_q)
            for end in range(PREFILL_ROWS - PREFILL_TOKENS + block_q, PREFILL_ROWS + 1, block_q)]
    row_bytes = 2 * head_dim * ITEM_BYTES[dtype]
    queries_bytes = 2 * PREFILL_TOKENS * NUM_HEADS * head_dim * ITEM_BYTES[dtype]  # read, and as much written
    moved = num_kv_heads * -(-group // heads) * sum(sees) * (row_bytes + 4) + queries_bytes
    needed = num_kv_heads * PREFILL_ROWS * row_bytes + queries_bytes
    pointers = dict(query_ptr=dtype, out_ptr=dtype, key_ptr=dtype, value_ptr=dtype, block_tables_ptr="i32",
                    query_start_loc_ptr="i32", kv_lens_ptr="i32")
    return _variant(
        "prefill", prefill_kernel, pointers, _shape(dtype, head_dim, group, block_size, mask),
        dict(num_seqs="i32", query_stride="i32", block_stride="i32", table_stride="i32", scale="fp32"),
        dict(GROUP=group, HEADS=heads, ROWS=config.rows, BLOCK_SIZE=block_size, HEAD_DIM=head_dim, TILE_N=config.tile_n,
             WINDOW=mask.window, NUM_SINKS=mask.num_sinks, SOFT_CAP=mask.soft_cap),
        config.num_warps, config.num_stages, moved / needed)


def _write(dtype: str, head_dim: int) -> Variant:
    pointers = dict(key_rows_ptr=dtype, value_rows_ptr=dtype, key_ptr=dtype, value_ptr=dtype, slot_mapping_ptr="i64")
    return _variant(
        "write_kv", write_kv_kernel, pointers, f"{dtype} d{head_dim}",
        dict(num_slots="i32", row_size="i32", key_stride="i32", value_stride="i32", block_stride="i32"),
        dict(BLOCK_SIZE=16, HEAD_DIM=head_dim, CHUNK=WRITE_CHUNK), 4, 3, 1.0)


def _copy() -> Variant:
    pointers = dict(source_ptr="i64", destination_ptr="i64", pairs_ptr="i64")
    return _variant("copy_blocks", copy_blocks_kernel, pointers, "any dtype",
                    dict(num_words="i32", source_stride="i32", destination_stride="i32"),
                    dict(CHUNK=COPY_CHUNK_WORDS), 4, 3, 1.0)


def _variant(kernel_name: str, kernel: Any, pointers: dict[str, str], shape: str, scalars: dict[str, str],
             constants: dict[str, Any], num_warps: int, num_stages: int, moved_per_needed: float) -> Variant:
    signature = {name: f"*{dtype}" for name, dtype in pointers.items()} | scalars
    signature |= dict.fromkeys(constants, "constexpr")
    return Variant(f"{kernel_name} {shape}", kernel, constants, signature, num_warps, num_stages, moved_per_needed)


def _shape(dtype: str, head_dim: int, group: int, block_size: int, mask: Mask) -> str:
    windowed = "" if mask == CAUSAL else " window+sinks+cap"
    return f"{dtype} d{head_dim} group {group} block {block_size}{windowed}"
