// What a tile of query rows reads: which KV rows each sees, where they lie, and how they become floats.
#pragma once

#include "abi.h"
#include "simd.h"

namespace kvarto {
namespace KVARTO_ISA {

KVARTO_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
KVARTO_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
KVARTO_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

struct Shape {
  int64_t dim, padded_dim, record, group, rows;

  Shape(const KvartoAttention& call, const AttentionTile& tile)
      : dim(call.cache.head_dim),
        padded_dim(round_up(dim, DIM_ALIGN)),
        record(RECORD_HEAD + padded_dim),
        group(call.num_heads / call.cache.num_kv_heads),
        rows(tile.num_queries * group) {}
};

// KV rows, or places in a tile of them.
struct Span {
  int64_t begin, end;

  bool empty() const { return begin >= end; }
};

// The KV rows that query rows see in the sinks or in one chunk. Both ends grow, or stay, from each query row to the next.
struct Sight {
  int64_t first_visible, window, group;
  Span limits;
  bool far;  // limits are the sinks, of which those behind the window count

  Sight(const KvartoAttention& call, const AttentionTile& tile, const Shape& shape, bool sinks, int64_t chunk)
      : first_visible(tile.first_visible),
        window(call.window),
        group(shape.group),
        limits(sinks ? Span{0, call.num_sinks} : Span{chunk * CHUNK, (chunk + 1) * CHUNK}),
        far(sinks) {}

  Span operator()(int64_t query_row) const {
    const int64_t visible = first_visible + query_row / group, behind = larger(0, visible - window);
    const Span all = far ? Span{0, behind} : Span{behind, visible};
    return {larger(limits.begin, all.begin), smaller(limits.end, all.end)};
  }
};

// Per-thread memory; attention.cpp sizes it.
struct Scratch {
  float *query, *piece, *running, *weights, *keys, *values;

  Scratch(float* memory, const Shape& shape) {
    query = memory;
    piece = query + shape.rows * shape.padded_dim;
    running = piece + shape.rows * shape.record;
    weights = running + shape.rows * shape.record;
    keys = weights + MAX_QUERY_ROWS * TILE;
    values = keys + TILE * shape.padded_dim;
  }
};

// Finds the K and V rows of one sequence and KV head.
template <class T>
struct RowFinder {
  const char* head;  // this layer and KV head in block 0
  const int32_t* block_table;
  int64_t block_bytes, value_bytes, row_bytes, scale_bytes, block_mask;
  int block_shift;

  RowFinder(const KvartoAttention& call, const AttentionTile& tile) {
    const KvartoCache& cache = call.cache;
    row_bytes = cache.head_dim * sizeof(T);
    scale_bytes = cache.block_size * row_bytes;
    const int64_t head_bytes = scale_bytes + (QUANTIZED<T> ? cache.block_size * (int64_t)sizeof(float) : 0);
    value_bytes = cache.num_kv_heads * head_bytes;
    block_bytes = cache.num_layers * 2 * value_bytes;
    head = (const char*)cache.data + call.layer * 2 * value_bytes + tile.kv_head * head_bytes;
    block_table = tile.block_table;
    block_mask = cache.block_size - 1;
    block_shift = __builtin_ctzll(cache.block_size);
  }

  __attribute__((always_inline)) const char* block(int64_t row) const {
    return head + (int64_t)block_table[row >> block_shift] * block_bytes;
  }
  __attribute__((always_inline)) const T* key(int64_t row) const {
    return (const T*)(block(row) + (row & block_mask) * row_bytes);
  }
  __attribute__((always_inline)) const T* value_of(const T* key) const {
    return (const T*)((const char*)key + value_bytes);
  }
  __attribute__((always_inline)) const char* key_scale(int64_t row) const {
    return block(row) + scale_bytes + (row & block_mask) * sizeof(float);
  }
};

// The scales of a tile of quantized rows. They are common to a row's elements: K's multiply its scores, V's its weights.
struct RowScales {
  float keys[TILE], values[TILE];

  template <class T>
  __attribute__((always_inline)) void load(const RowFinder<T>& rows, int64_t place, int64_t row) {
    const char* found = rows.key_scale(row);
    memcpy(keys + place, found, sizeof(float));
    memcpy(values + place, found + rows.value_bytes, sizeof(float));
  }
};

template <class T>
static void load_queries_as(const T* query, int64_t stride, float factor, const AttentionTile& tile,
                            const Shape& shape, float* out) {
  const Vec scale = set1(factor);
  for (int64_t r = 0; r < shape.rows; ++r) {
    const T* row = query + (tile.first_token + r / shape.group) * stride +
                   (tile.kv_head * shape.group + r % shape.group) * shape.dim;
    for (int64_t d = 0; d < shape.padded_dim; d += WIDTH) {
      const int64_t left = shape.dim - d;
      store(out + r * shape.padded_dim + d, left > 0 ? mul(load_some(row + d, left), scale) : zero());
    }
  }
}

constexpr float LOG2_E = 1.4426950408889634f;

// Widened, zero-padded, and scaled so that scores come out as softmax_step wants them: times log2(e), so that it may
// use powers of two, or, where it caps them, as parts of the cap.
static void load_queries(const KvartoAttention& call, const AttentionTile& tile, const Shape& shape, bool far,
                         float* out) {
  const void* query = far ? call.far_query : call.query;
  const int64_t stride = far ? call.far_query_stride : call.query_stride;
  const float factor = call.soft_cap > 0.0f ? call.scale / call.soft_cap : call.scale * LOG2_E;
  switch (call.dtype) {
    case KVARTO_BF16: return load_queries_as((const bf16*)query, stride, factor, tile, shape, out);
    case KVARTO_F16: return load_queries_as((const f16*)query, stride, factor, tile, shape, out);
    default: return load_queries_as((const float*)query, stride, factor, tile, shape, out);
  }
}

template <class T>
static void widen_row(const T* in, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; d += WIDTH) store(out + d, load_some(in + d, dim - d));
}

// Rotates by the opposite of the angles; element i goes with element i + half.
static void turn_back(float* key, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = key[i], second = key[half + i];
    key[i] = first * cos[i] + second * sin[i];
    key[half + i] = second * cos[i] - first * sin[i];
  }
}

}  // namespace KVARTO_ISA
}  // namespace kvarto
