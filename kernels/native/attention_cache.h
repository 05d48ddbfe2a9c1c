// Where the KV rows of a job lie in the paged cache.
#pragma once

#include "abi.h"
#include "simd.h"

namespace kvarto {
namespace KVARTO_ISA {

KVARTO_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
KVARTO_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
KVARTO_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// KV rows, or places in a tile of them.
struct Span {
  int64_t begin, end;

  bool empty() const { return begin >= end; }
};

// K or V rows of a tile, of one KV head.
template <class T>
struct TileRows {
  using Element = T;
  const T* runs[TILE / RUN];
  int64_t stride;

  KVARTO_MEMBER const T* operator[](uint64_t place) const { return runs[place / RUN] + place % RUN * stride; }
};

// A tile's runs of rows in the first KV head of a job.
struct Places {
  const char *keys[TILE / RUN], *key_scales[TILE / RUN];
};

// Finds the rows of one sequence.
struct RowFinder {
  const char* layer;  // this layer and the job's first KV head in block 0
  const int32_t* block_table;
  int64_t row_bytes, scale_bytes, head_bytes, value_bytes, block_bytes, block_size;
  int block_shift;
  bool scaled;

  RowFinder(const KvartoAttention& call, const AttentionTile& tile, int64_t element_bytes, bool is_scaled)
      : scaled(is_scaled) {
    const KvartoCache& cache = call.cache;
    row_bytes = cache.head_dim * element_bytes;
    scale_bytes = cache.block_size * row_bytes;
    head_bytes = scale_bytes + (scaled ? cache.block_size * (int64_t)sizeof(float) : 0);
    value_bytes = cache.num_kv_heads * head_bytes;
    block_bytes = cache.num_layers * 2 * value_bytes;
    layer = (const char*)cache.data + call.layer * 2 * value_bytes + tile.kv_head * head_bytes;
    block_table = tile.block_table;
    block_size = cache.block_size;
    block_shift = __builtin_ctzll(cache.block_size);
  }

  KVARTO_MEMBER const char* block(int64_t row) const {
    return layer + (int64_t)block_table[row >> block_shift] * block_bytes;
  }
  KVARTO_MEMBER const char* key(int64_t row) const { return block(row) + (row & (block_size - 1)) * row_bytes; }
  KVARTO_MEMBER const char* key_scale(int64_t row) const {
    return block(row) + scale_bytes + (row & (block_size - 1)) * (int64_t)sizeof(float);
  }

  // Of the tile at row `first`, rows `held` are looked at; runs without any stand where the nearest does that has some.
  KVARTO_MEMBER Places locate(int64_t first, Span held) const {
    Places places;
    for (int64_t i = 0; i < TILE / RUN; ++i) {
      const int64_t run = larger(held.begin / RUN, smaller(i, (held.end - 1) / RUN));
      places.keys[i] = key(first + run * RUN);
      if (scaled) places.key_scales[i] = key_scale(first + run * RUN);
    }
    return places;
  }

  template <class T>
  KVARTO_MEMBER TileRows<T> keys(const Places& places, int64_t head) const {
    TileRows<T> rows;
    for (int64_t i = 0; i < TILE / RUN; ++i) rows.runs[i] = (const T*)(places.keys[i] + head * head_bytes);
    rows.stride = row_bytes / (int64_t)sizeof(T);
    return rows;
  }
  template <class T>
  KVARTO_MEMBER TileRows<T> values(const Places& places, int64_t head) const {
    TileRows<T> rows = keys<T>(places, head);
    for (int64_t i = 0; i < TILE / RUN; ++i) rows.runs[i] = (const T*)((const char*)rows.runs[i] + value_bytes);
    return rows;
  }
};

// The scales of a tile of quantized rows. They are common to a row's elements: K's multiply its scores, V's its weights.
struct RowScales {
  float keys[TILE], values[TILE];

  KVARTO_MEMBER void load(const RowFinder& rows, const Places& places, int64_t head) {
    for (int64_t i = 0; i < TILE / RUN; ++i) {
      const char* found = places.key_scales[i] + head * rows.head_bytes;
      memcpy(keys + i * RUN, found, RUN * sizeof(float));
      memcpy(values + i * RUN, found + rows.value_bytes, RUN * sizeof(float));
    }
  }
};

}  // namespace KVARTO_ISA
}  // namespace kvarto
