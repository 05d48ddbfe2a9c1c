// Query rows of one KV head times a tile of its keys.
#pragma once

#include "attention_columns.h"

namespace kvarto {
namespace KVARTO_ISA {

template <int N>
struct Count {
  static constexpr int value = N;
};

// Calls visit(Count<dim>), or visit(Count<0>) for a head_dim that has no code of its own: where it is known when
// compiled, loops over columns are none and addresses need no arithmetic.
template <class Visit>
KVARTO_INLINE void with_dim(int64_t dim, Visit visit) {
  if (dim == 64) return visit(Count<64>());
  if (dim == 128) return visit(Count<128>());
  visit(Count<0>());
}

// Calls visit(Count<Q>, r) for rows r .. r + Q - 1, which share each load of K or V, until all have been visited.
template <class Visit>
KVARTO_INLINE void each_few(int64_t rows, Visit visit) {
  for (int64_t r = 0, count; r < rows; r += count) {
    const int64_t left = rows - r;
    count = left == MAX_QUERY_ROWS + 1 ? left / 2 : smaller(MAX_QUERY_ROWS, left);  // 2 + 2 is quicker than 3 + 1
    if (count == 1) visit(Count<1>(), r);
    if (count == 2) visit(Count<2>(), r);
    if constexpr (MAX_QUERY_ROWS >= 3)
      if (count == 3) visit(Count<3>(), r);
    if constexpr (MAX_QUERY_ROWS >= 4)
      if (count == 4) visit(Count<4>(), r);
  }
}

// scores[q][0..3] = query q . key rows 0..3; rows of scores are TILE apart.
template <int Q, class T>
KVARTO_INLINE void score_four(const float* query, const T* keys, int64_t stride, int64_t padded_dim, int64_t dim,
                              float* scores) {
  Vec sums[Q][4];
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < 4; ++r) sums[q][r] = zero();
  for (int64_t d = 0; d < dim; d += WIDTH) {  // rows are widened where they end within a vector
    Vec queries[Q];
    for (int q = 0; q < Q; ++q) queries[q] = pinned(load(query + q * padded_dim + d));
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const Vec key = pinned(load(keys + r * stride + d));
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) sums[q][r] = fma(queries[q], key, sums[q][r]);
    }
  }
  for (int q = 0; q < Q; ++q) reduce_add4(sums[q][0], sums[q][1], sums[q][2], sums[q][3], scores + q * TILE);
}

// The scores of a KV head's query rows, of which row r sees seen[r]. Around what a few rows see, rows of the cache are
// scored in fours whatever they hold; softmax_step does away with those.
template <class T>
static void score(const float* query, const TileRows<T>& keys, const Span* seen, const Shape& shape, float* scores,
                  float*, Ahead* ahead) {
  each_few(shape.rows, [&](auto count, int64_t r) __attribute__((always_inline)) {
    constexpr int Q = decltype(count)::value;
    for (int64_t j = seen[r].begin / 4 * 4; j < seen[r + Q - 1].end; j += 4) {
      score_four<Q>(query + r * shape.padded_dim, keys[j], keys.stride, shape.padded_dim, shape.dim,
                    scores + r * TILE + j);
      if (ahead && r == 0) ahead->use(4 * keys.stride * (int64_t)sizeof(T));
    }
  });
}

#if defined(__AVX512BF16__)
static void score_few(const bf16* query, const TileRows<bf16>& keys, const Span* seen, const Shape& shape,
                      float* scores, Ahead* ahead) {
  const int64_t padded_dim = shape.padded_dim, run_bytes = RUN * keys.stride * (int64_t)sizeof(bf16);
  with_dim(shape.dim, [&](auto fixed) __attribute__((always_inline)) {
    constexpr int64_t DIM = decltype(fixed)::value;
    each_few(shape.rows, [&](auto count, int64_t r) __attribute__((always_inline)) {
      constexpr int Q = decltype(count)::value;
      for (int64_t j = seen[r].begin / RUN * RUN; j < seen[r + Q - 1].end; j += RUN) {
        score_run<Q, DIM>(query + r * padded_dim * QUADS, padded_dim, {keys[j], shape.dim}, scores + r * TILE + j);
        if (ahead && r == 0) ahead->use(run_bytes);
      }
    });
  });
}

static void score_many(const bf16* query, const ColumnsLaidOut& keys, const Span* seen, const Shape& shape,
                       float* scores) {
  const int64_t padded_dim = shape.padded_dim;
  with_dim(padded_dim, [&](auto fixed) __attribute__((always_inline)) {
    constexpr int64_t DIM = decltype(fixed)::value;
    each_few(shape.rows, [&](auto count, int64_t r) __attribute__((always_inline)) {
      constexpr int Q = decltype(count)::value;
      const bf16* rows = query + r * padded_dim;
      float* out = scores + r * TILE;
      const int64_t end = seen[r + Q - 1].end;
      int64_t j = seen[r].begin / WIDTH * WIDTH;
      for (; j + WIDTH < end; j += 2 * WIDTH) score_vectors<Q, 2, DIM>(rows, padded_dim, keys.from(j), out + j);
      if (j < end) score_vectors<Q, 1, DIM>(rows, padded_dim, keys.from(j), out + j);
    });
  });
}

// The same of bf16. wide: TILE * padded_dim, for the keys laid out.
static void score(const bf16* query, const TileRows<bf16>& keys, const Span* seen, const Shape& shape, float* scores,
                  float* wide, Ahead* ahead) {
  if (few_rows(shape)) return score_few(query, keys, seen, shape, scores, ahead);
  const ColumnsLaidOut columns((bf16*)wide, shape.padded_dim);
  for (int64_t j = seen[0].begin / WIDTH * WIDTH; j < seen[shape.rows - 1].end; j += WIDTH) {
    columns.lay_out(keys, j, shape.dim);
    if (ahead) ahead->use(WIDTH * shape.dim * (int64_t)sizeof(bf16));
  }
  score_many(query, columns, seen, shape, scores);
}
#endif

}  // namespace KVARTO_ISA
}  // namespace kvarto
