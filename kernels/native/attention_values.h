// The weighted sum of a tile of V for the query rows of one KV head. Unless rows go in pairs, sums lie as load_pair
// gives columns: it widens two vectors of bf16 in two instructions if it may have even and odd columns apart. load_sums
// puts either right.
#pragma once

#include "attention_pairs.h"

namespace kvarto {
namespace KVARTO_ISA {

// sums[q][d..] += weights[q][j] * values[j][d..] for j in order, in registers.
template <int Q, int D, class T>
KVARTO_INLINE void accumulate_columns(const float* weights, const TileRows<T>& values, Span rows, int64_t d, float* sums,
                                      int64_t record, Ahead* ahead) {
  Vec held[Q][D];
  for (int q = 0; q < Q; ++q)
    for (int n = 0; n < D; ++n) held[q][n] = load(sums + q * record + d + n * WIDTH);
  for (int64_t j = rows.begin; j < rows.end;) {
    const int64_t run_end = smaller(rows.end, (j / RUN + 1) * RUN);
    const T* value_row = values[j] + d;
    for (; j < run_end; ++j, value_row += values.stride) {
      Vec weight[Q];
      for (int q = 0; q < Q; ++q) weight[q] = set1(weights[q * TILE + j]);
      const auto add = [&](int n, Vec column) __attribute__((always_inline)) {
        column = pinned(column);
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) held[q][n] = fma(weight[q], column, held[q][n]);
      };
      if constexpr (D == 1) {
        add(0, load(value_row));
      } else {
#pragma GCC unroll 4
        for (int n = 0; n < D; n += 2) {
          Vec low, high;
          load_pair(value_row + n * WIDTH, low, high);
          add(n, low), add(n + 1, high);
        }
      }
    }
    if (ahead) ahead->use(RUN * D * WIDTH * (int64_t)sizeof(T));
  }
  for (int q = 0; q < Q; ++q)
    for (int n = 0; n < D; ++n) store(sums + q * record + d + n * WIDTH, held[q][n]);
}

template <int Q, class T>
static void accumulate(const float* weights, const TileRows<T>& values, Span rows, int64_t dim, float* sums,
                       int64_t record, Ahead* ahead) {
  constexpr int D = Q == 1 ? 8 : 4;  // enough independent sums to hide the latency of an FMA
  int64_t d = 0;
  for (; d + D * WIDTH <= dim; d += D * WIDTH)
    accumulate_columns<Q, D>(weights, values, rows, d, sums, record, ahead);
  for (; d + 2 * WIDTH <= dim; d += 2 * WIDTH)
    accumulate_columns<Q, 2>(weights, values, rows, d, sums, record, ahead);
  for (; d < dim; d += WIDTH) accumulate_columns<Q, 1>(weights, values, rows, d, sums, record, ahead);
}

// A tile as floats; widen_row(place, row) widens each of the rows that are held.
template <class T, class WidenRow>
KVARTO_INLINE TileRows<float> widen(Span held, const Shape& shape, float* wide, Ahead* ahead, WidenRow widen_row) {
  for (int64_t j = held.begin; j < held.end; ++j) {
    widen_row(j, wide + j * shape.padded_dim);
    if (ahead) ahead->use(shape.dim * (int64_t)sizeof(T));
  }
  TileRows<float> rows;
  for (int64_t i = 0; i < TILE / RUN; ++i) rows.runs[i] = wide + i * RUN * shape.padded_dim;
  rows.stride = shape.padded_dim;
  return rows;
}

// A tile as many query rows take it: rows as floats, which lie as their sums are to lie.
template <class T>
static TileRows<float> lay_out(const TileRows<T>& values, Span held, const Shape& shape, float* wide, Ahead* ahead) {
  return widen<T>(held, shape, wide, ahead, [&](int64_t j, float* out) {
    int64_t d = 0;
    for (; d + 2 * WIDTH <= shape.dim; d += 2 * WIDTH) {
      Vec low, high;
      load_pair(values[j] + d, low, high);
      store(out + d, low), store(out + d + WIDTH, high);
    }
    for (; d < shape.dim; d += WIDTH) store(out + d, load_some(values[j] + d, shape.dim - d));
  });
}
#if defined(__AVX512BF16__)
static PairsLaidOut lay_out(const TileRows<bf16>& values, Span held, const Shape& shape, float* wide, Ahead* ahead) {
  const PairsLaidOut pairs = {values, shape.padded_dim, (bf16*)wide};
  pairs.lay_out(held, shape.dim, ahead);
  return pairs;
}
#endif

// Columns d .. d + 2 * WIDTH of sums of values of cache_dtype.
KVARTO_INLINE void load_sums(const float* sums, int32_t cache_dtype, int64_t d, int64_t dim, Vec& low, Vec& high) {
  low = load(sums + d), high = load(sums + d + WIDTH);
  if (cache_dtype != KVARTO_BF16) return;
#if defined(__AVX512BF16__)
  (void)dim, unzip(low, high);
#else
  if (d + 2 * WIDTH <= dim) interleave(low, high);
#endif
}

// Adds what a KV head's query rows see of V to their records, times the weights, which lie TILE floats apart.
template <class Rows>
KVARTO_INLINE void add_values(const float* weights, const Rows& values, const Span* seen, const Shape& shape,
                       float* records, Ahead* ahead) {
  using W = Weights<typename Rows::Element>;
  constexpr int64_t STEP = W::PAIRED ? 2 : 1;
  const int64_t dim = W::PAIRED ? shape.dim : round_up(shape.dim, WIDTH);
  each_few(shape.rows, [&](auto count, int64_t first) {
    constexpr int Q = decltype(count)::value;
    const auto add = [&](auto few, int64_t r, Span rows, Ahead* pace) {
      constexpr int N = decltype(few)::value;
      if (rows.empty()) return;
      accumulate<N>((const typename W::type*)(weights + r * TILE), values, rows, dim,
                    records + r * shape.record + RECORD_HEAD, shape.record, pace);
    };
    const int64_t last = first + Q - 1;
    // What all see is read once for all; before and behind it, each goes alone, so that all add step after step.
    const Span common = {round_up(seen[last].begin, STEP), seen[first].end & -STEP};
    if (common.empty()) {
      for (int64_t r = first; r <= last; ++r) add(Count<1>(), r, seen[r], nullptr);
      return;
    }
    for (int64_t r = first; r <= last; ++r) add(Count<1>(), r, {seen[r].begin, common.begin}, nullptr);
    add(count, first, common, first == 0 ? ahead : nullptr);
    for (int64_t r = first; r <= last; ++r) add(Count<1>(), r, {common.end, seen[r].end}, nullptr);
  });
}

}  // namespace KVARTO_ISA
}  // namespace kvarto
