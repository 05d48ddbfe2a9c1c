// Scores of bf16 keys and many queries. Keys are laid out by columns, WIDTH of them side by side: each lane has one dot
// product, and a query is taken two columns at a time, in every lane. What is added up, and in which order, is as in
// attention_quads.h: each of the QUADS parts of a row's vectors by itself, then the first two and the last two, then both.
#pragma once

#include "attention_quads.h"

namespace kvarto {
namespace KVARTO_ISA {

#if defined(__AVX512BF16__)
// A tile of keys: of a PART of the columns, of each part of it, of each two columns, all vectors of keys.
class ColumnsLaidOut {
 public:
  ColumnsLaidOut(bf16* columns, int64_t padded_dim) : columns_(columns), padded_dim_(padded_dim) {}

  // WIDTH keys, from the one at j, where a vector begins.
  void lay_out(const TileRows<bf16>& keys, int64_t j, int64_t dim) const {
    RunOfKeys<0> first(keys[j], dim), second(keys[j + RUN], dim);
    for (int64_t d = 0; d < padded_dim_; d += PART) {
      first.turn_to(d), second.turn_to(d);
#pragma GCC unroll 4
      for (int64_t i = 0; i < QUADS; ++i) {
        Pairs parts[QUADS] = {first.quad(0, i), first.quad(1, i), second.quad(0, i), second.quad(1, i)};
        transpose_parts(parts);
#pragma GCC unroll 4
        for (int64_t n = 0; n < QUADS; ++n) store(columns_ + 2 * j + place(d, n, i), parts[n]);
      }
    }
  }

  const bf16* from(int64_t j) const { return columns_ + 2 * j; }

  // From there, where a vector of columns column(d, n, i) and the next lies.
  static constexpr int64_t place(int64_t d, int64_t n, int64_t i) { return d * TILE + (n * QUADS + i) * 2 * TILE; }
  static constexpr int64_t column(int64_t d, int64_t n, int64_t i) { return d + n * PART / QUADS + 2 * i; }

 private:
  bf16* columns_;
  int64_t padded_dim_;
};
static_assert(RUN_QUADS == 2 && WIDTH == 2 * RUN, "two runs have the quads of a vector");

// Of query q and V vectors of keys, the sums of parts FIRST and FIRST + 1. DIM: padded_dim, or 0 where it is not known
// when compiled.
template <int Q, int V, int64_t FIRST, int64_t DIM>
KVARTO_INLINE void score_two_parts(const bf16* query, int64_t any_dim, const bf16* keys, Vec (&out)[Q][V]) {
  const int64_t dim = DIM ? DIM : any_dim;
  Vec sums[2][Q][V];
#pragma GCC unroll 2
  for (auto& part : sums)
#pragma GCC unroll 4
    for (auto& row : part)
#pragma GCC unroll 2
      for (Vec& sum : row) sum = zero();
#pragma GCC unroll 4
  for (int64_t d = 0; d < dim; d += PART) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < QUADS; ++i) {
#pragma GCC unroll 2
      for (int n = 0; n < 2; ++n) {
        Pairs columns[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
          columns[v] = pinned(load_pairs(keys + v * 2 * WIDTH + ColumnsLaidOut::place(d, FIRST + n, i)));
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) {
          const Pairs both = pinned(set1_pair(query + q * dim + ColumnsLaidOut::column(d, FIRST + n, i)));
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) sums[n][q][v] = fma(both, columns[v], sums[n][q][v]);
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) out[q][v] = add(sums[0][q][v], sums[1][q][v]);
}

// scores[q][..] = query q . keys of V vectors; rows of scores are TILE apart.
template <int Q, int V, int64_t DIM>
KVARTO_INLINE void score_vectors(const bf16* query, int64_t padded_dim, const bf16* keys, float* scores) {
  Vec first[Q][V], last[Q][V];
  score_two_parts<Q, V, 0, DIM>(query, padded_dim, keys, first);
  score_two_parts<Q, V, 2, DIM>(query, padded_dim, keys, last);
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) store(scores + q * TILE + v * WIDTH, add(first[q][v], last[q][v]));
}
#endif

}  // namespace KVARTO_ISA
}  // namespace kvarto
