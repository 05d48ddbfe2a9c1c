// Query rows of one KV head times a tile of its keys.
#pragma once

#include "attention_ahead.h"
#include "attention_rows.h"

namespace kvarto {
namespace KVARTO_ISA {

template <int N>
struct Count {
  static constexpr int value = N;
};

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

// Products of a query of S with keys of T: the columns that one step takes, and how both are loaded for it.
template <class S, class T>
struct Dot;

template <class T>
struct Dot<float, T> {
  static constexpr int64_t COLUMNS = WIDTH;
  using Operand = Vec;
  static KVARTO_MEMBER Vec query(const float* p) { return load(p); }
  static KVARTO_MEMBER Vec keys(const T* p) { return load(p); }
  static KVARTO_MEMBER Vec last_keys(const T* p, int64_t) { return load(p); }  // rows are widened where they end within
};

#if defined(__AVX512BF16__)
template <>
struct Dot<bf16, bf16> {
  static constexpr int64_t COLUMNS = 2 * WIDTH;
  using Operand = Pairs;
  static KVARTO_MEMBER Pairs query(const bf16* p) { return load_pairs(p); }
  static KVARTO_MEMBER Pairs keys(const bf16* p) { return load_pairs(p); }
  static KVARTO_MEMBER Pairs last_keys(const bf16* p, int64_t count) { return load_some_pairs(p, count); }
};
#endif

// scores[q][0..3] = query q . key rows 0..3; rows of scores are TILE apart.
template <int Q, class S, class T>
KVARTO_INLINE void score_four(const S* query, const T* keys, int64_t stride, int64_t padded_dim, int64_t dim,
                              float* scores) {
  using D = Dot<S, T>;
  Vec sums[Q][4];
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < 4; ++r) sums[q][r] = zero();
  const auto step = [&](int64_t d, auto load_keys) __attribute__((always_inline)) {
    typename D::Operand queries[Q];
    for (int q = 0; q < Q; ++q) queries[q] = pinned(D::query(query + q * padded_dim + d));
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const typename D::Operand key = pinned(load_keys(keys + r * stride + d));
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) sums[q][r] = fma(queries[q], key, sums[q][r]);
    }
  };
  int64_t d = 0;
  for (; d + D::COLUMNS <= dim; d += D::COLUMNS) step(d, [](const T* p) { return D::keys(p); });
  if (d < dim) step(d, [left = dim - d](const T* p) { return D::last_keys(p, left); });
  for (int q = 0; q < Q; ++q) reduce_add4(sums[q][0], sums[q][1], sums[q][2], sums[q][3], scores + q * TILE);
}

// The scores of a KV head's query rows, of which row r sees seen[r]. Around what a few rows see, rows of the cache are
// scored in fours whatever they hold; softmax_step does away with those.
template <class S, class T>
static void score(const S* query, const TileRows<T>& keys, const Span* seen, const Shape& shape, float* scores,
                  Ahead* ahead) {
  each_few(shape.rows, [&](auto count, int64_t r) {
    constexpr int Q = decltype(count)::value;
    for (int64_t j = seen[r].begin / 4 * 4; j < seen[r + Q - 1].end; j += 4) {
      score_four<Q>(query + r * shape.padded_dim, keys[j], keys.stride, shape.padded_dim, shape.dim,
                    scores + r * TILE + j);
      if (ahead && r == 0) ahead->use(4 * keys.stride * (int64_t)sizeof(T));
    }
  });
}

}  // namespace KVARTO_ISA
}  // namespace kvarto
