// Query rows of one KV head against one tile of KV rows: scores, softmax, weighted sum of V.
#pragma once

#include "attention_ahead.h"
#include "attention_rows.h"

namespace kvarto {
namespace KVARTO_ISA {

constexpr float NEG_INFINITY = -__builtin_inff();

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

// scores[q][0..3] = query q . key rows 0..3; rows of scores are TILE apart.
template <int Q, class T>
KVARTO_INLINE void score_four(const float* query, const T* keys, int64_t stride, int64_t padded_dim, int64_t dim,
                              float* scores) {
  Vec sums[Q][4];
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < 4; ++r) sums[q][r] = zero();
  for (int64_t d = 0; d < dim; d += WIDTH) {
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
                  Ahead* ahead) {
  const int64_t dim = round_up(shape.dim, WIDTH);
  each_few(shape.rows, [&](auto count, int64_t r) {
    constexpr int Q = decltype(count)::value;
    for (int64_t j = seen[r].begin / 4 * 4; j < seen[r + Q - 1].end; j += 4) {
      score_four<Q>(query + r * shape.padded_dim, keys[j], keys.stride, shape.padded_dim, dim, scores + r * TILE + j);
      if (ahead && r == 0) ahead->use(4 * keys.stride * (int64_t)sizeof(T));
    }
  });
}

// sums[q][d..] = sums * decay[q] + weights[q][j] * values[j][d..] for j in order, in registers.
template <int Q, int D, class T>
KVARTO_INLINE void accumulate_columns(const float* weights, const float* decay, const TileRows<T>& values, Span rows,
                                      int64_t d, float* sums, int64_t record, Ahead* ahead) {
  Vec held[Q][D];
  for (int q = 0; q < Q; ++q)
    for (int n = 0; n < D; ++n) held[q][n] = mul(load(sums + q * record + d + n * WIDTH), set1(decay[q]));
  for (int64_t j = rows.begin; j < rows.end;) {
    const int64_t run_end = smaller(rows.end, (j / RUN + 1) * RUN);
    const T* value_row = values[j] + d;
    for (; j < run_end; ++j, value_row += values.stride) {
      Vec weight[Q];
      for (int q = 0; q < Q; ++q) weight[q] = set1(weights[q * TILE + j]);
#pragma GCC unroll 8
      for (int n = 0; n < D; ++n) {
        const Vec value = pinned(load(value_row + n * WIDTH));
#pragma GCC unroll 4
        for (int q = 0; q < Q; ++q) held[q][n] = fma(weight[q], value, held[q][n]);
      }
    }
    if (ahead) ahead->use(RUN * D * WIDTH * (int64_t)sizeof(T));
  }
  for (int q = 0; q < Q; ++q)
    for (int n = 0; n < D; ++n) store(sums + q * record + d + n * WIDTH, held[q][n]);
}

template <int Q, class T>
static void accumulate(const float* weights, const float* decay, const TileRows<T>& values, Span rows, int64_t dim,
                       float* sums, int64_t record, Ahead* ahead) {
  constexpr int D = Q == 1 ? 8 : 4;  // enough independent sums to hide the latency of an FMA
  int64_t d = 0;
  for (; d + D * WIDTH <= dim; d += D * WIDTH)
    accumulate_columns<Q, D>(weights, decay, values, rows, d, sums, record, ahead);
  for (; d + 2 * WIDTH <= dim; d += 2 * WIDTH)
    accumulate_columns<Q, 2>(weights, decay, values, rows, d, sums, record, ahead);
  for (; d < dim; d += WIDTH) accumulate_columns<Q, 1>(weights, decay, values, rows, d, sums, record, ahead);
}

// Adds what a KV head's query rows see of V to their records, times the weights.
template <class T>
static void add_values(const float* weights, const TileRows<T>& values, const Span* seen, float* decay,
                       const Shape& shape, float* records, Ahead* ahead) {
  const int64_t dim = round_up(shape.dim, WIDTH);
  each_few(shape.rows, [&](auto count, int64_t first) {
    constexpr int Q = decltype(count)::value;
    const auto add = [&](auto few, int64_t r, Span rows, Ahead* pace) {
      constexpr int N = decltype(few)::value;
      if (rows.empty()) return;
      accumulate<N>(weights + r * TILE, decay + r, values, rows, dim, records + r * shape.record + RECORD_HEAD,
                    shape.record, pace);
      for (int q = 0; q < N; ++q) decay[r + q] = 1.0f;
    };
    const int64_t last = first + Q - 1;
    // What all see is read once for all; before and behind it, each goes alone, so that all add row after row.
    const Span common = {seen[last].begin, seen[first].end};
    if (common.empty()) {
      for (int64_t r = first; r <= last; ++r) add(Count<1>(), r, seen[r], nullptr);
      return;
    }
    for (int64_t r = first; r < last; ++r) add(Count<1>(), r, {seen[r].begin, common.begin}, nullptr);
    add(count, first, common, first == 0 ? ahead : nullptr);
    for (int64_t r = first + 1; r <= last; ++r) add(Count<1>(), r, {common.end, seen[r].end}, nullptr);
  });
}

// What is done to scores before the softmax, and to weights after it.
struct Bend {
  float soft_cap;
  const RowScales* scales;  // null: rows are not quantized

  void scores(float* row, Span seen) const {
    if (!scales && soft_cap == 0.0f) return;
    const Vec cap = set1(soft_cap * LOG2_E);
    for (int64_t j = seen.begin / WIDTH * WIDTH; j < seen.end; j += WIDTH) {
      Vec score = load(row + j);
      if (scales) score = mul(score, load(scales->keys + j));
      store(row + j, soft_cap > 0.0f ? mul(cap, tanh(score)) : score);
    }
  }

  void weights(float* row, Span seen) const {
    if (!scales) return;
    for (int64_t j = seen.begin / WIDTH * WIDTH; j < seen.end; j += WIDTH)
      store(row + j, mul(load(row + j), load(scales->values + j)));
  }
};

// Turns the scores that are seen (the rest of the tile is not looked at) into weights exp2(score - max),
// updates max and sum of the record and returns by how much earlier weights shrink.
static float softmax_step(float* scores, Span seen, const Bend& bend, float* record) {
  bend.scores(scores, seen);
  const int64_t begin = seen.begin / WIDTH * WIDTH;
  for (int64_t j = begin; j < seen.begin; ++j) scores[j] = NEG_INFINITY;
  for (int64_t j = seen.end; j < round_up(seen.end, WIDTH); ++j) scores[j] = NEG_INFINITY;
  Vec highest = set1(record[0]);
  for (int64_t j = begin; j < seen.end; j += WIDTH) highest = max(highest, load(scores + j));
  const float new_max = reduce_max(highest);
  Vec total = zero();
  for (int64_t j = begin; j < seen.end; j += WIDTH) {
    const Vec weight = exp2(sub(load(scores + j), set1(new_max)));
    store(scores + j, weight);
    total = add(total, weight);
  }
  const float decay = exp2(record[0] - new_max);
  record[0] = new_max;
  record[1] = record[1] * decay + reduce_add(total);
  bend.weights(scores, seen);
  return decay;
}

}  // namespace KVARTO_ISA
}  // namespace kvarto
