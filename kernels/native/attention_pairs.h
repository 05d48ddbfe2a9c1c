// The weighted sum of a tile of bf16 values, two rows at a time: weights are rounded to bf16, as in FlashAttention
// (Dao et al. 2022), and one instruction adds the products of both rows. Sums lie as `zip` leaves columns.
#pragma once

#include "attention_scores.h"

namespace kvarto {
namespace KVARTO_ISA {

// What the weights of values of T are, and whether rows go in pairs: rows 2 i and 2 i + 1, whoever sees them.
template <class T>
struct Weights {
  using type = float;
  static constexpr bool PAIRED = false;
};

#if defined(__AVX512BF16__)
template <>
struct Weights<bf16> {
  using type = bf16;
  static constexpr bool PAIRED = true;
};

// In the place of a row that is not seen, and may hold anything.
alignas(64) static const bf16 NO_ROW[8 * WIDTH] = {};

// sums[q][d..] += weights[q][j] * values[j][d..] for j in order, in registers. Rows of weights are 2 * TILE apart.
template <int Q, int D, class LoadColumns>
KVARTO_INLINE void accumulate_pairs(const bf16* weights, const TileRows<bf16>& values, Span rows, int64_t d,
                                    LoadColumns load_columns, float* sums, int64_t record, Ahead* ahead) {
  static_assert(D * WIDTH <= (int64_t)(sizeof NO_ROW / sizeof(bf16)), "it stands for as many columns");
  Vec held[Q][D];
  for (int q = 0; q < Q; ++q)
    for (int n = 0; n < D; ++n) held[q][n] = load(sums + q * record + d + n * WIDTH);
  const auto add = [&](int64_t j, const bf16* even, const bf16* odd) __attribute__((always_inline)) {
    Pairs weight[Q];
    for (int q = 0; q < Q; ++q) weight[q] = pinned(set1_pair(weights + q * 2 * TILE + j));
#pragma GCC unroll 4
    for (int n = 0; n < D; n += 2) {
      Pairs low, high;
      zip(load_columns(even + n * WIDTH), load_columns(odd + n * WIDTH), low, high);
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        held[q][n] = fma(weight[q], low, held[q][n]);
        held[q][n + 1] = fma(weight[q], high, held[q][n + 1]);
      }
    }
  };
  int64_t j = rows.begin & -2;
  if (j < rows.begin) add(j, NO_ROW, values[j + 1] + d), j += 2;
  while (j + 1 < rows.end) {
    const int64_t run_end = smaller(rows.end & -2, (j / RUN + 1) * RUN);
    const bf16* row = values[j] + d;
    for (; j < run_end; j += 2, row += 2 * values.stride) add(j, row, row + values.stride);
    if (ahead) ahead->use(RUN * D * WIDTH * (int64_t)sizeof(bf16));
  }
  if (j < rows.end) add(j, values[j] + d, NO_ROW);
  for (int q = 0; q < Q; ++q)
    for (int n = 0; n < D; ++n) store(sums + q * record + d + n * WIDTH, held[q][n]);
}

template <int Q>
static void accumulate(const bf16* weights, const TileRows<bf16>& values, Span rows, int64_t dim, float* sums,
                       int64_t record, Ahead* ahead) {
  constexpr int D = Q == 1 ? 8 : 4;  // enough independent sums to hide the latency of an FMA
  const auto whole = [](const bf16* p) { return load_pairs(p); };
  int64_t d = 0;
  for (; d + D * WIDTH <= dim; d += D * WIDTH)
    accumulate_pairs<Q, D>(weights, values, rows, d, whole, sums, record, ahead);
  for (; d + 2 * WIDTH <= dim; d += 2 * WIDTH)
    accumulate_pairs<Q, 2>(weights, values, rows, d, whole, sums, record, ahead);
  if (d < dim)
    accumulate_pairs<Q, 2>(weights, values, rows, d, [left = dim - d](const bf16* p) {
      return load_some_pairs(p, left);
    }, sums, record, ahead);
}

// Pairs of rows of a tile, zipped once since many query rows take them. One that goes alone takes rows as they lie in the
// cache: it may see half of a pair.
struct PairsLaidOut {
  using Element = bf16;
  TileRows<bf16> rows;
  int64_t padded_dim;
  bf16* pairs;

  bf16* pair(int64_t j) const { return pairs + j * padded_dim; }

  void lay_out(Span held, int64_t dim, Ahead* ahead) const {
    for (int64_t j = held.begin & -2; j < held.end;) {
      const int64_t run_end = smaller(held.end, (j / RUN + 1) * RUN);
      const bf16* row = rows[j];
      for (bf16* out = pair(j); j < run_end; j += 2, row += 2 * rows.stride, out += 2 * padded_dim) {
        int64_t d = 0;
        for (; d + 2 * WIDTH <= dim; d += 2 * WIDTH)
          zip_columns(load_pairs(row + d), load_pairs(row + rows.stride + d), out + 2 * d);
        if (const int64_t left = dim - d)
          zip_columns(load_some_pairs(row + d, left), load_some_pairs(row + rows.stride + d, left), out + 2 * d);
      }
      if (ahead) ahead->use(RUN * dim * (int64_t)sizeof(bf16));
    }
  }

 private:
  static KVARTO_MEMBER void zip_columns(Pairs even, Pairs odd, bf16* out) {
    Pairs low, high;
    zip(even, odd, low, high);
    store(out, low), store(out + 2 * WIDTH, high);
  }
};

// The same of columns d .. d + D * WIDTH of whole pairs that were laid out.
template <int Q, int D>
KVARTO_INLINE void accumulate_laid_out(const bf16* weights, const PairsLaidOut& values, Span rows, int64_t d,
                                       float* sums, int64_t record) {
  Vec held[Q][D];
  for (int q = 0; q < Q; ++q)
    for (int n = 0; n < D; ++n) held[q][n] = load(sums + q * record + d + n * WIDTH);
  const bf16* pair = values.pair(rows.begin) + 2 * d;
  for (int64_t j = rows.begin; j < rows.end; j += 2, pair += 2 * values.padded_dim) {
    Pairs columns[D];
#pragma GCC unroll 4
    for (int n = 0; n < D; ++n) columns[n] = pinned(load_pairs(pair + n * 2 * WIDTH));
#pragma GCC unroll 4
    for (int q = 0; q < Q; ++q) {
      const Pairs weight = pinned(set1_pair(weights + q * 2 * TILE + j));
#pragma GCC unroll 4
      for (int n = 0; n < D; ++n) held[q][n] = fma(weight, columns[n], held[q][n]);
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int n = 0; n < D; ++n) store(sums + q * record + d + n * WIDTH, held[q][n]);
}

template <int Q>
KVARTO_INLINE void accumulate(const bf16* weights, const PairsLaidOut& values, Span rows, int64_t dim, float* sums,
                       int64_t record, Ahead*) {
  if constexpr (Q == 1) return accumulate<1>(weights, values.rows, rows, dim, sums, record, nullptr);
  int64_t d = 0;
  for (; d + 4 * WIDTH <= dim; d += 4 * WIDTH) accumulate_laid_out<Q, 4>(weights, values, rows, d, sums, record);
  for (; d < dim; d += 2 * WIDTH) accumulate_laid_out<Q, 2>(weights, values, rows, d, sums, record);
}
#endif

}  // namespace KVARTO_ISA
}  // namespace kvarto
