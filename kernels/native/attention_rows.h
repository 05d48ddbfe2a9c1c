// The query rows of a job: which KV rows each sees, and how what it reads becomes floats.
#pragma once

#include "attention_cache.h"

namespace kvarto {
namespace KVARTO_ISA {

struct Shape {
  int64_t dim, padded_dim, record, group;
  int64_t heads, rows;  // KV heads, and query rows of each

  Shape(const KvartoAttention& call, const AttentionTile& tile)
      : dim(call.cache.head_dim),
        padded_dim(round_up(dim, DIM_ALIGN)),
        record(RECORD_HEAD + padded_dim),
        group(call.num_heads / call.cache.num_kv_heads),
        heads(tile.num_kv_heads),
        rows(tile.num_queries * group) {}

  int64_t all_rows() const { return heads * rows; }
  // Where a row of the job lies in query and out.
  int64_t element(const KvartoAttention& call, const AttentionTile& tile, int64_t row, int64_t stride) const {
    const int64_t head = tile.kv_head + row / rows, inside = row % rows;
    return (tile.first_token + inside / group) * stride + (head * group + inside % group) * call.cache.head_dim;
  }
};

// The KV rows that query rows see in one piece of the work. Both ends grow, or stay, from each query row to the next.
struct Sight {
  int64_t first_visible, window, group;
  Span limits;
  bool far;            // limits are the sinks, of which those behind the window count
  bool own;            // only rows of the block that the query itself is in, which the residual holds
  int64_t block_size;  // beside a residual, all other pieces end where that block begins; else 0

  static Sight of(const KvartoAttention& call, const AttentionTile& tile, const Shape& shape, Span limits, bool far,
                  bool own) {
    return {tile.first_visible, call.window, shape.group, limits, far, own,
            call.residual_tables ? call.residual.block_size : 0};
  }
  static Sight sinks(const KvartoAttention& call, const AttentionTile& tile, const Shape& shape, bool own = false) {
    return of(call, tile, shape, {0, call.num_sinks}, true, own);
  }
  static Sight chunk(const KvartoAttention& call, const AttentionTile& tile, const Shape& shape, int64_t chunk) {
    return of(call, tile, shape, {chunk * CHUNK, (chunk + 1) * CHUNK}, false, false);
  }
  static Sight own_block(const KvartoAttention& call, const AttentionTile& tile, const Shape& shape) {
    return of(call, tile, shape, {0, INT64_MAX}, false, true);
  }

  Span operator()(int64_t query_row) const { return of_query(query_row / group); }

  Span of_query(int64_t query) const {
    const int64_t visible = first_visible + query, behind = larger(0, visible - window);
    Span all = far ? Span{0, behind} : Span{behind, visible};
    if (block_size) {
      const int64_t begin = (visible - 1) & -block_size;
      (own ? all.begin : all.end) = own ? larger(all.begin, begin) : smaller(all.end, begin);
    }
    return {larger(limits.begin, all.begin), smaller(limits.end, all.end)};
  }

  // From the first to the last KV row that any of the query rows sees; beside a residual, some see none.
  Span hull(int64_t rows) const {
    int64_t first = 0, last = rows - 1;
    while (first < last && (*this)(first).empty()) ++first;
    while (first < last && (*this)(last).empty()) --last;
    return {(*this)(first).begin, (*this)(last).end};
  }

  // Of the tile of KV rows at `first`, the places that each query row of a KV head sees.
  void places(int64_t first, int64_t rows, Span* seen) const {
    for (int64_t query = 0, r = 0; r < rows; ++query) {
      const Span all = of_query(query);
      const Span inside = {smaller(larger(all.begin - first, 0), TILE), smaller(larger(all.end - first, 0), TILE)};
      for (const int64_t end = r + group; r < end; ++r) seen[r] = inside;
    }
  }
};

// The rows of all chunks that the tile is about.
static inline Span chunk_rows(const AttentionTile& tile, const KvartoAttention& call, const Shape& shape) {
  if (tile.chunk_begin == tile.chunk_end) return {0, 0};
  return {Sight::chunk(call, tile, shape, tile.chunk_begin)(0).begin,
          Sight::chunk(call, tile, shape, tile.chunk_end - 1)(shape.rows - 1).end};
}

static inline bool few_rows(const Shape& shape) { return shape.rows <= 2 * MAX_QUERY_ROWS; }

// Per-thread memory; attention.cpp sizes it.
struct Scratch {
  float* query;  // or of another type, in as many elements
  float *piece, *running;
  float* weights;  // of a tile, for all rows; first the scores
  float* wide;     // rows of a tile
  Span* seen;      // places in a tile, for the rows of a KV head

  Scratch(float* memory, const Shape& shape) {
    const int64_t rows = shape.all_rows();
    query = memory;
    piece = query + rows * shape.padded_dim * QUERY_FLOATS;
    running = piece + rows * shape.record;
    weights = running + rows * shape.record;
    wide = weights + rows * TILE;
    seen = (Span*)(wide + TILE * shape.padded_dim);
  }
};

// What queries are held as to be multiplied with the keys of a cache of T.
template <class T>
struct QueryFor {
  using type = float;
};
#if defined(__AVX512BF16__)
template <>
struct QueryFor<bf16> {
  using type = bf16;
};
#endif

// Elements that a column of a query takes: what few rows meet is quads of keys.
static inline int64_t column_elements(const float*, const Shape&) { return 1; }
#if defined(__AVX512BF16__)
static inline int64_t column_elements(const bf16*, const Shape& shape) { return few_rows(shape) ? QUADS : 1; }
static_assert(QUADS * sizeof(bf16) <= QUERY_FLOATS * sizeof(float), "scratch has room for it");

// Makes of a row what its products with quads of keys take: from the back, since it grows where it stands.
static inline void spread_query(bf16* row, int64_t padded_dim) {
  for (int64_t d = padded_dim - 2 * WIDTH; d >= 0; d -= 2 * WIDTH) spread(load_pairs(row + d), row + d * QUADS);
}
#endif
static inline void spread_query(float*, int64_t) {}

template <class S>
KVARTO_INLINE S* query_row(S* queries, const Shape& shape, int64_t row) {
  return queries + row * shape.padded_dim * column_elements(queries, shape);
}

template <class S, class T>
static void load_queries_as(const KvartoAttention& call, const T* query, int64_t stride, const AttentionTile& tile,
                            const Shape& shape, S* out) {
  for (int64_t r = 0; r < shape.all_rows(); ++r) {
    const T* row = query + shape.element(call, tile, r, stride);
    S* held = query_row(out, shape, r);
    for (int64_t d = 0; d < shape.padded_dim; d += WIDTH) {
      const int64_t left = shape.dim - d;
      store(held + d, left > 0 ? load_some(row + d, left) : zero());
    }
    if (column_elements(out, shape) > 1) spread_query(held, shape.padded_dim);
  }
}

// Zero-padded, and as S, which holds them exactly.
template <class S>
static void load_queries(const KvartoAttention& call, const AttentionTile& tile, const Shape& shape, bool far,
                         S* out) {
  const void* query = far ? call.far_query : call.query;
  const int64_t stride = far ? call.far_query_stride : call.query_stride;
  switch (call.dtype) {
    case KVARTO_BF16: return load_queries_as(call, (const bf16*)query, stride, tile, shape, out);
    case KVARTO_F16: return load_queries_as(call, (const f16*)query, stride, tile, shape, out);
    default: return load_queries_as(call, (const float*)query, stride, tile, shape, out);
  }
}

template <class T>
static void widen_key(const T* in, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; d += WIDTH) store(out + d, load_some(in + d, dim - d));
}

// Rotates by the opposite of the angles; element i goes with element i + half.
static inline void turn_back(float* key, const float* cos, const float* sin, int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    const float first = key[i], second = key[half + i];
    key[i] = first * cos[i] + second * sin[i];
    key[half + i] = second * cos[i] - first * sin[i];
  }
}

}  // namespace KVARTO_ISA
}  // namespace kvarto
