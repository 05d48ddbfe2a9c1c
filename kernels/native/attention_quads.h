// Scores of bf16 keys and few queries. Keys are laid out in quads, four side by side, so that each lane has sums of one
// key only and no dot product needs a reduction of its own.
#pragma once

#include "attention_ahead.h"
#include "attention_rows.h"

namespace kvarto {
namespace KVARTO_ISA {

#if defined(__AVX512BF16__)
constexpr int64_t PART = 2 * WIDTH;  // columns that a vector of a row holds; QUADS vectors of four rows hold as many
constexpr int64_t RUN_QUADS = RUN / 4;
static_assert(RUN % 8 == 0, "quads are reduced two by two");

// A run of keys, read once as they lie in the cache and kept in registers. DIM: the head_dim, or 0 where it is not known
// when compiled.
template <int64_t DIM>
class RunOfKeys {
 public:
  KVARTO_MEMBER RunOfKeys(const bf16* keys, int64_t dim) : keys_(keys), dim_(dim) {}

  KVARTO_MEMBER void turn_to(int64_t d) {
    const int64_t dim = DIM ? DIM : dim_, left = dim - d;
    const auto row = [&](int64_t j) __attribute__((always_inline)) {
      const bf16* key = keys_ + j * dim + d;
      return left < PART ? load_some_pairs(key, left) : load_pairs(key);
    };
#pragma GCC unroll 2
    for (int64_t n = 0; n < RUN_QUADS; ++n)
      make_quads(row(4 * n), row(4 * n + 1), row(4 * n + 2), row(4 * n + 3), quads_[n]);
  }
  KVARTO_MEMBER Pairs quad(int64_t n, int64_t i) const { return quads_[n][i]; }

 private:
  const bf16* keys_;
  int64_t dim_;
  Pairs quads_[RUN_QUADS][QUADS];
};

// scores[q][..] = query q . keys of the run; rows of scores are TILE apart.
template <int Q, int64_t DIM>
KVARTO_INLINE void score_run(const bf16* query, int64_t any_padded_dim, RunOfKeys<DIM> run, float* scores) {
  const int64_t padded_dim = DIM ? DIM : any_padded_dim;
  Vec sums[Q][RUN_QUADS];
  for (auto& row : sums)
    for (Vec& sum : row) sum = zero();
  for (int64_t d = 0; d < padded_dim; d += PART) {
    run.turn_to(d);
#pragma GCC unroll 4
    for (int64_t i = 0; i < QUADS; ++i) {
      Pairs keys[RUN_QUADS];
#pragma GCC unroll 4
      for (int n = 0; n < RUN_QUADS; ++n) keys[n] = pinned(run.quad(n, i));
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) {
        const Pairs columns = pinned(load_pairs(query + (q * padded_dim + d) * QUADS + i * PART));
#pragma GCC unroll 4
        for (int n = 0; n < RUN_QUADS; ++n) sums[q][n] = fma(columns, keys[n], sums[q][n]);
      }
    }
  }
#pragma GCC unroll 4
  for (int q = 0; q < Q; ++q)
#pragma GCC unroll 2
    for (int n = 0; n < RUN_QUADS; n += 2) reduce_quads(sums[q][n], sums[q][n + 1], scores + q * TILE + 4 * n);
}
#endif

}  // namespace KVARTO_ISA
}  // namespace kvarto
