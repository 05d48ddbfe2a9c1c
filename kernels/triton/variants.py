"""The named kernel variants that are compiled ahead of time, with the traffic that each is estimated to cause.

They are launched as `launch.py` launches them: same constants, same configuration, and the same arguments known to be
multiples of 16. Workloads: decode of one sequence of 32,768 rows; a prefill chunk of 2,048 tokens at the end of 4,096
rows; 32 query heads, as many KV heads as the group leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..kv_layout import SCALE_BYTES, int4_head_bytes
from ..mask import CAUSAL, Mask
from .cache import copy_blocks_kernel, write_kv_kernel, write_quantized_kv_kernel
from .configs import COPY_CHUNK_WORDS, MAX_DECODE_HEADS, WRITE_CHUNK, TileConfig, config_for
from .decode import decode_kernel, reduce_kernel
from .int4 import decode_int4_kernel, prefill_int4_kernel
from .launch import even_share, heads_per_write, quantize_warps, splits_for
from .masks import MaskConstants
from .prefill import prefill_kernel
from .quantize_int4 import quantize_blocks_kernel
from .sparsity import compact_rows_kernel, receive_kernel, score_sums_kernel
from .sparsity_launch import SCORED_ROWS, rows_per_copy
from .tiles import padded_dim

TARGETS = {"cuda-80": ("cuda", 80, 32), "cuda-90": ("cuda", 90, 32), "cuda-100": ("cuda", 100, 32),
           "hip-gfx942": ("hip", "gfx942", 64)}
"""Name -> backend, architecture and threads of a warp."""

NUM_HEADS = 32
DECODE_ROWS, PREFILL_ROWS, PREFILL_TOKENS = 32_768, 4_096, 2_048
ITEM_BYTES = {"fp16": 2, "bf16": 2, "fp32": 4}
POINTERS = {"int8": "i8", "fp8": "u8"}
INT4 = "int4"
WINDOWED = Mask(window=4096, num_sinks=4)
CAPPED = Mask(window=4096, num_sinks=4, soft_cap=50.0)
STREAMING, CEILING = "streaming sinks", "ceiling sinks"
"""The two kinds of far sinks: keys as they lie, and keys turned back."""


class FarTypes(NamedTuple):
    """The types of `FarTensors`."""

    query: str
    stride: str
    cos: str
    sin: str


class ResidualTypes(NamedTuple):
    """The types of `ResidualTensors`."""

    key: str
    value: str
    block_tables: str
    stride: str


@dataclass(frozen=True, slots=True)
class Variant:
    """`signature`: argument -> type, or types if it is a tuple. `moved_per_needed`: bytes that the programs load and
    store over bytes that have to be read and written once. What exceeds 1 is served by L2 as far as it reaches.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    signature: dict[str, str | tuple[str, ...]]
    num_warps: int
    num_stages: int
    moved_per_needed: float


@dataclass(frozen=True, slots=True)
class Shape:
    """What tells the variants of an attention kernel apart. `cache`: "" is the queries' dtype; int8, fp8 or int4."""

    dtype: str
    head_dim: int
    group: int = 4
    block_size: int = 16
    mask: Mask = CAUSAL
    far: str = ""
    cache: str = ""

    @property
    def row_bytes(self) -> float:
        """Of K and V in one KV head, on the average."""
        if self.cache == INT4:
            return int4_head_bytes(self.block_size, self.head_dim) / self.block_size
        return 2 * (self.head_dim + SCALE_BYTES if self.cache else self.head_dim * ITEM_BYTES[self.dtype])

    @property
    def text(self) -> str:
        masked = self.far or {CAUSAL: "", CAPPED: "window+sinks+cap"}[self.mask]
        dtypes = f"{self.dtype} {self.cache}".strip()
        return f"{dtypes} d{self.head_dim} group {self.group} block {self.block_size} {masked}".strip()

    @property
    def pointers(self) -> dict[str, str | tuple[str, ...]]:
        """The types of what K and V are read from."""
        if self.cache == INT4:
            dense = f"*{self.dtype}"
            return dict(cache_ptr="*u8", residual=ResidualTypes(dense, dense, "*i32", "i32"))
        element = f"*{POINTERS.get(self.cache, self.dtype)}"
        return dict(key_ptr=element, value_ptr=element)

    @property
    def far_signature(self) -> str | tuple[str, ...]:
        angles = "*fp32" if self.far == CEILING else "constexpr"
        return FarTypes(f"*{self.dtype}", "i32", angles, angles) if self.far else "constexpr"

    @property
    def constants(self) -> dict[str, Any]:
        mask, rotary = self.mask, self.head_dim if self.far == CEILING else None
        return dict(GROUP=self.group, BLOCK_SIZE=self.block_size, HEAD_DIM=self.head_dim,
                    MASK=MaskConstants(mask.window, mask.num_sinks, mask.soft_cap, rotary))


def variants(target: str) -> list[Variant]:
    """All of them, as one of `TARGETS` runs them."""
    backend, arch, _ = TARGETS[target]

    def config(kernel: str, dtype: str, head_dim: int, cache: str = "") -> TileConfig:
        kernel = f"{kernel} int4" if cache == INT4 else kernel
        return config_for(kernel, backend, str(arch), padded_dim(head_dim), ITEM_BYTES[dtype])

    shapes = [Shape(dtype, dim) for dtype in ("bf16", "fp32") for dim in (64, 80, 96, 128, 256)]
    shapes += [Shape("fp16", 128), Shape("bf16", 128, block_size=128), Shape("bf16", 128, group=1),
               Shape("bf16", 64, group=32), Shape("bf16", 256, group=32), Shape("fp32", 256, group=32),
               Shape("bf16", 128, mask=CAPPED)]
    shapes += [Shape("bf16", dim, mask=WINDOWED, far=far) for dim in (64, 128) for far in (STREAMING, CEILING)]
    shapes += [Shape("bf16", dim, block_size=block_size, cache=cache)
               for cache in (*POINTERS, INT4) for dim, block_size in ((64, 16), (128, 16), (128, 128))]
    shapes += [Shape("bf16", 256, cache=INT4), Shape("fp32", 128, cache=INT4),
               Shape("bf16", 64, mask=WINDOWED, far=CEILING, cache=INT4)]
    found = [_decode(shape, config("decode", shape.dtype, shape.head_dim, shape.cache)) for shape in shapes]
    found += [_reduce(dtype, dim, config("decode", dtype, dim)) for dtype, dim in (("bf16", 128), ("fp32", 256))]
    found += [_reduce("bf16", 128, config("decode", "bf16", 128, INT4), int4_block_size=16)]
    found += [_prefill(shape, config("prefill", shape.dtype, shape.head_dim, shape.cache)) for shape in shapes]
    found += [_write("bf16", 128), _write("bf16", 80), _write("fp32", 128)]
    found += [_write_quantized("bf16", 128, cache) for cache in POINTERS]
    for shape in (Shape("bf16", 64, 3), Shape("bf16", 128), Shape("fp32", 128), Shape("bf16", 128, cache="int8")):
        found += _scores(shape, config("decode", shape.dtype, shape.head_dim))
    found += [_quantize("bf16", dim, block_size) for dim, block_size in ((64, 16), (128, 16), (128, 128))]
    return [*found, _copy(), _compact("bf16", 128), _compact("i8", 128)]


def _decode(shape: Shape, config: TileConfig) -> Variant:
    heads = even_share(shape.group, MAX_DECODE_HEADS)
    num_splits = splits_for(DECODE_ROWS)
    rows = DECODE_ROWS if shape.mask.window is None else shape.mask.window + shape.mask.num_sinks
    rows_bytes = rows * shape.row_bytes
    queries_bytes = shape.group * shape.head_dim * ITEM_BYTES[shape.dtype]
    partial_bytes = shape.group * num_splits * (shape.head_dim + 1) * 4
    ids_bytes = 4 * (rows // config.tile_n if shape.block_size % config.tile_n == 0 else rows)
    num_tiles = -(-shape.group // heads)
    moved = num_tiles * (rows_bytes + ids_bytes) + num_splits * queries_bytes + partial_bytes
    pointers = dict(query_ptr=shape.dtype, block_tables_ptr="i32", query_start_loc_ptr="i32", kv_lens_ptr="i32",
                    partial_ptr="fp32", lse_ptr="fp32")
    return _variant(
        "decode", decode_int4_kernel if shape.cache == INT4 else decode_kernel, pointers, shape.text,
        shape.pointers | dict(
            query_stride="i32", block_stride="i32", table_stride="i32", scale="fp32", far=shape.far_signature),
        shape.constants | dict(HEADS=heads, TILE_N=config.tile_n, NUM_SPLITS=num_splits),
        config.num_warps, config.num_stages, moved / (rows_bytes + 2 * queries_bytes))


def _reduce(dtype: str, head_dim: int, config: TileConfig, int4_block_size: int | None = None) -> Variant:
    num_splits = splits_for(DECODE_ROWS)
    pointers = dict(partial_ptr="fp32", lse_ptr="fp32", out_ptr=dtype, query_start_loc_ptr="i32", kv_lens_ptr="i32")
    return _variant(
        "reduce", reduce_kernel, pointers, f"{dtype}{' int4' if int4_block_size else ''} d{head_dim}", {},
        dict(HEAD_DIM=head_dim, TILE_N=config.tile_n, NUM_SPLITS=num_splits,
             MASK=MaskConstants(None, 0, None, None), INT4_BLOCK_SIZE=int4_block_size), 4, 3, 1.0)


def _prefill(shape: Shape, config: TileConfig) -> Variant:
    heads = even_share(shape.group, config.rows)
    block_q, num_kv_heads = config.rows // heads, NUM_HEADS // shape.group
    sees = [min(end, PREFILL_ROWS if shape.mask.window is None else shape.mask.window + block_q)
            for end in range(PREFILL_ROWS - PREFILL_TOKENS + block_q, PREFILL_ROWS + 1, block_q)]
    # Read, and as much written.
    queries_bytes = 2 * PREFILL_TOKENS * NUM_HEADS * shape.head_dim * ITEM_BYTES[shape.dtype]
    moved = num_kv_heads * -(-shape.group // heads) * sum(sees) * (shape.row_bytes + 4) + queries_bytes
    needed = num_kv_heads * PREFILL_ROWS * shape.row_bytes + queries_bytes
    pointers = dict(query_ptr=shape.dtype, out_ptr=shape.dtype, block_tables_ptr="i32", query_start_loc_ptr="i32",
                    kv_lens_ptr="i32")
    return _variant(
        "prefill", prefill_int4_kernel if shape.cache == INT4 else prefill_kernel, pointers, shape.text,
        shape.pointers | dict(
            num_seqs="i32", query_stride="i32", block_stride="i32", table_stride="i32", scale="fp32",
             far=shape.far_signature),
        shape.constants | dict(HEADS=heads, ROWS=config.rows, TILE_N=config.tile_n),
        config.num_warps, config.num_stages, moved / needed)


def _scores(shape: Shape, config: TileConfig) -> list[Variant]:
    """Both passes over K, for a lone query of a sequence."""
    num_splits = splits_for(DECODE_ROWS)
    keys_bytes = DECODE_ROWS * shape.row_bytes // 2
    queries_bytes = shape.group * shape.head_dim * ITEM_BYTES[shape.dtype]
    ids_bytes = 4 * (DECODE_ROWS // config.tile_n if shape.block_size % config.tile_n == 0 else DECODE_ROWS)
    lse_bytes = 4 * shape.group * num_splits
    inputs = dict(query_ptr=shape.dtype, key_ptr=POINTERS.get(shape.cache, shape.dtype), block_tables_ptr="i32",
                  query_start_loc_ptr="i32", kv_lens_ptr="i32", num_scored_ptr="i32", lse_ptr="fp32")
    scalars: dict[str, str | tuple[str, ...]] = dict(query_stride="i32", block_stride="i32", table_stride="i32",
                                                     scale="fp32")
    constants = dict(GROUP=shape.group, ROWS=SCORED_ROWS, BLOCK_SIZE=shape.block_size,
                     HEAD_DIM=shape.head_dim, TILE_N=config.tile_n, NUM_SPLITS=num_splits, SOFT_CAP=shape.mask.soft_cap)
    moved_once = keys_bytes + ids_bytes + num_splits * queries_bytes + lse_bytes
    moved_again = keys_bytes + ids_bytes + DECODE_ROWS // config.tile_n * (queries_bytes + lse_bytes) + 4 * DECODE_ROWS
    return [
        _variant("score_sums", score_sums_kernel, inputs, shape.text, dict(num_seqs="i32", **scalars), constants,
                 config.num_warps, config.num_stages, moved_once / (keys_bytes + queries_bytes)),
        _variant("receive", receive_kernel, inputs | dict(received_ptr="fp32"), shape.text,
                 dict(max_rows="i32", **scalars), constants, config.num_warps, config.num_stages,
                 moved_again / (keys_bytes + queries_bytes + 4 * DECODE_ROWS))]


def _compact(dtype: str, head_dim: int) -> Variant:
    pointers = dict(key_ptr=dtype, value_ptr=dtype, rows_ptr="i32", source_tables_ptr="i32", target_tables_ptr="i32",
                    num_kept_ptr="i32")
    return _variant("compact_rows", compact_rows_kernel, pointers, f"{dtype.replace('i8', 'int8')} d{head_dim}",
                    dict(max_kept="i32", block_stride="i32", source_table_stride="i32", target_table_stride="i32"),
                    dict(BLOCK_SIZE=16, HEAD_DIM=head_dim, ROWS=rows_per_copy(head_dim)), 4, 3, 1.0)


def _write(dtype: str, head_dim: int) -> Variant:
    pointers = dict(key_rows_ptr=dtype, value_rows_ptr=dtype, key_ptr=dtype, value_ptr=dtype, slot_mapping_ptr="i64")
    return _variant(
        "write_kv", write_kv_kernel, pointers, f"{dtype} d{head_dim}",
        dict(num_slots="i32", row_size="i32", key_stride="i32", value_stride="i32", block_stride="i32"),
        dict(BLOCK_SIZE=16, HEAD_DIM=head_dim, CHUNK=WRITE_CHUNK), 4, 3, 1.0)


def _write_quantized(dtype: str, head_dim: int, cache: str) -> Variant:
    pointers = dict(key_rows_ptr=dtype, value_rows_ptr=dtype, key_ptr=POINTERS[cache], value_ptr=POINTERS[cache],
                    slot_mapping_ptr="i64")
    return _variant(
        "write_kv", write_quantized_kv_kernel, pointers, f"{dtype} {cache} d{head_dim}",
        dict(num_slots="i32", num_kv_heads="i32", key_stride="i32", value_stride="i32", block_stride="i32"),
        dict(BLOCK_SIZE=16, HEAD_DIM=head_dim, HEADS=heads_per_write(head_dim)), 4, 3, 1.0)


def _quantize(dtype: str, head_dim: int, block_size: int) -> Variant:
    half_tile = padded_dim(head_dim) // 2
    pointers = dict(key_ptr=dtype, value_ptr=dtype, cache_ptr="u8", residual_blocks_ptr="i64", blocks_ptr="i64")
    return _variant(
        "quantize_blocks", quantize_blocks_kernel, pointers, f"{dtype} d{head_dim} block {block_size}",
        dict(num_residual_blocks="i32", num_blocks="i32", residual_stride="i32", block_stride="i32"),
        dict(BLOCK_SIZE=block_size, HEAD_DIM=head_dim, HALF_TILE=half_tile), quantize_warps(block_size * half_tile), 3,
        1.0)


def _copy() -> Variant:
    pointers = dict(source_ptr="i64", destination_ptr="i64", pairs_ptr="i64")
    return _variant("copy_blocks", copy_blocks_kernel, pointers, "any dtype",
                    dict(num_words="i32", source_stride="i32", destination_stride="i32"),
                    dict(CHUNK=COPY_CHUNK_WORDS), 4, 3, 1.0)


def _variant(kernel_name: str, kernel: Any, pointers: dict[str, str], shape: str,
             scalars: dict[str, str | tuple[str, ...]], constants: dict[str, Any], num_warps: int, num_stages: int,
             moved_per_needed: float) -> Variant:
    signature = {name: f"*{dtype}" for name, dtype in pointers.items()} | scalars
    signature |= dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in kernel.arg_names}
    return Variant(f"{kernel_name} {shape}", kernel, constants, ordered, num_warps, num_stages, moved_per_needed)
