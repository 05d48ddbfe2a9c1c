"""Tile shapes, warps and pipeline stages per architecture: a table, so that serving never stops to tune.

The choice looks at what is known before a launch: the padded head_dim and the width of an element. The values were
chosen by registers and shared memory as compiled (`docs/kernels.md`), not yet by time on a device.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_SPLITS = 32
"""Programs that share the rows of one sequence and KV head in decode; a power of two."""
MAX_DECODE_HEADS = 32
"""Query heads in a decode tile. A larger group takes several tiles, which read the rows again (from L2)."""
COPY_CHUNK_WORDS = 1024
WRITE_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class TileConfig:
    """`rows`: of a prefill tile (tokens by heads); decode takes what its heads need. `tile_n`: rows of K and V."""

    tile_n: int
    num_warps: int
    num_stages: int
    rows: int = 16


# (padded head_dim up to which it holds, bytes of an element up to which it holds) -> config; the first that fits.
Table = dict[tuple[int, int], TileConfig]

_DECODE_CUDA: Table = {
    (64, 2): TileConfig(tile_n=64, num_warps=4, num_stages=3),
    (128, 2): TileConfig(tile_n=64, num_warps=4, num_stages=3),
    (256, 2): TileConfig(tile_n=32, num_warps=4, num_stages=3),
    (64, 4): TileConfig(tile_n=32, num_warps=8, num_stages=2),
    (256, 4): TileConfig(tile_n=16, num_warps=8, num_stages=2),
}
# What int4 codes become takes registers.
_DECODE_INT4_CUDA: Table = {
    (64, 2): TileConfig(tile_n=64, num_warps=4, num_stages=3),
    (256, 2): TileConfig(tile_n=32, num_warps=4, num_stages=3),
    (256, 4): TileConfig(tile_n=16, num_warps=8, num_stages=2),
}
_PREFILL_INT4_CUDA: Table = {
    (128, 2): TileConfig(rows=128, tile_n=32, num_warps=8, num_stages=3),
    (256, 2): TileConfig(rows=64, tile_n=16, num_warps=8, num_stages=2),
    (256, 4): TileConfig(rows=32, tile_n=16, num_warps=8, num_stages=2),
}
_PREFILL_FLOAT32_CUDA: Table = {
    (64, 4): TileConfig(rows=64, tile_n=32, num_warps=8, num_stages=2),
    (128, 4): TileConfig(rows=64, tile_n=16, num_warps=8, num_stages=2),
    (256, 4): TileConfig(rows=32, tile_n=16, num_warps=8, num_stages=2),
}
_PREFILL_CUDA: Table = {
    (64, 2): TileConfig(rows=128, tile_n=32, num_warps=8, num_stages=3),
    (128, 2): TileConfig(rows=128, tile_n=32, num_warps=8, num_stages=3),
    (256, 2): TileConfig(rows=64, tile_n=32, num_warps=8, num_stages=2),
    **_PREFILL_FLOAT32_CUDA,
}
# Tensor cores that read shared memory leave registers for larger tiles.
_PREFILL_HOPPER: Table = {
    (64, 2): TileConfig(rows=128, tile_n=64, num_warps=8, num_stages=3),
    (128, 2): TileConfig(rows=128, tile_n=64, num_warps=8, num_stages=3),
    (256, 2): TileConfig(rows=128, tile_n=32, num_warps=8, num_stages=2),
    **_PREFILL_FLOAT32_CUDA,
}
_DECODE_HIP: Table = {
    (128, 4): TileConfig(tile_n=32, num_warps=4, num_stages=2),
    (256, 4): TileConfig(tile_n=16, num_warps=4, num_stages=2),
}
_PREFILL_HIP: Table = {
    (128, 4): TileConfig(rows=64, tile_n=32, num_warps=4, num_stages=2),
    (256, 4): TileConfig(rows=32, tile_n=16, num_warps=4, num_stages=2),
}
# Small tiles: tests then have several of them on few rows.
_INTERPRETER: Table = {(256, 4): TileConfig(rows=32, tile_n=32, num_warps=1, num_stages=1)}

_INT4_CUDA = {"decode int4": _DECODE_INT4_CUDA, "prefill int4": _PREFILL_INT4_CUDA}

# Architecture -> kernel -> table. An architecture that is not listed takes that of its maker.
CONFIGS: dict[str, dict[str, Table]] = {
    "cuda": {"decode": _DECODE_CUDA, "prefill": _PREFILL_CUDA, **_INT4_CUDA},
    "cuda-90": {"decode": _DECODE_CUDA, "prefill": _PREFILL_HOPPER, **_INT4_CUDA},
    "cuda-100": {"decode": _DECODE_CUDA, "prefill": _PREFILL_HOPPER, **_INT4_CUDA},
    "hip": {"decode": _DECODE_HIP, "prefill": _PREFILL_HIP, "decode int4": _DECODE_HIP, "prefill int4": _PREFILL_HIP},
    "interpreter": dict.fromkeys(("decode", "prefill", "decode int4", "prefill int4"), _INTERPRETER),
}


def config_for(kernel: str, backend: str, arch: str, padded_dim: int, item_bytes: int) -> TileConfig:
    """`kernel`: decode or prefill, or, over an int4 cache, "decode int4" or "prefill int4". `backend`: cuda, hip or
    interpreter. `arch`: "80", "gfx942" and the like."""
    table = CONFIGS.get(f"{backend}-{arch}", CONFIGS[backend])[kernel]
    return next(config for (max_dim, max_bytes), config in table.items()
                if padded_dim <= max_dim and item_bytes <= max_bytes)
