// Query rows against one tile of KV rows: scores, softmax, weighted sum of V.
#pragma once

#include "attention_rows.h"

namespace kvarto {
namespace KVARTO_ISA {

constexpr float NEG_INFINITY = -__builtin_inff();

// scores[q][0..3] = query q . key rows 0..3; rows of scores are TILE apart.
template <int Q, class T>
KVARTO_INLINE void score_four(const float* query, const T* const* keys, int64_t padded_dim, int64_t dim,
                              float* scores) {
  Vec sums[Q][4];
  for (int q = 0; q < Q; ++q)
    for (int r = 0; r < 4; ++r) sums[q][r] = zero();
  for (int64_t d = 0; d < dim; d += WIDTH) {
    Vec queries[Q];
    for (int q = 0; q < Q; ++q) queries[q] = pinned(load(query + q * padded_dim + d));
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const Vec key = pinned(load(keys[r] + d));
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) sums[q][r] = fma(queries[q], key, sums[q][r]);
    }
  }
  for (int q = 0; q < Q; ++q) reduce_add4(sums[q][0], sums[q][1], sums[q][2], sums[q][3], scores + q * TILE);
}

// sums[q][d..] = sums * decay[q] + weights[q][j] * values[j][d..] for j in order, in registers.
template <int Q, int D, class T>
KVARTO_INLINE void accumulate_columns(const float* weights, const float* decay, const T* const* values,
                                      int64_t count, int64_t d, float* sums, int64_t record) {
  Vec held[Q][D];
  for (int q = 0; q < Q; ++q)
    for (int n = 0; n < D; ++n) held[q][n] = mul(load(sums + q * record + d + n * WIDTH), set1(decay[q]));
  for (int64_t j = 0; j < count; ++j) {
    Vec weight[Q];
    for (int q = 0; q < Q; ++q) weight[q] = set1(weights[q * TILE + j]);
    const T* value_row = values[j] + d;
#pragma GCC unroll 8
    for (int n = 0; n < D; ++n) {
      const Vec value = pinned(load(value_row + n * WIDTH));
#pragma GCC unroll 4
      for (int q = 0; q < Q; ++q) held[q][n] = fma(weight[q], value, held[q][n]);
    }
  }
  for (int q = 0; q < Q; ++q)
    for (int n = 0; n < D; ++n) store(sums + q * record + d + n * WIDTH, held[q][n]);
}

template <int Q, class T>
static void accumulate(const float* weights, const float* decay, const T* const* values, int64_t count, int64_t dim,
                       float* sums, int64_t record) {
  constexpr int D = Q == 1 ? 8 : 4;  // enough independent sums to hide the latency of an FMA
  int64_t d = 0;
  for (; d + D * WIDTH <= dim; d += D * WIDTH)
    accumulate_columns<Q, D>(weights, decay, values, count, d, sums, record);
  for (; d + 2 * WIDTH <= dim; d += 2 * WIDTH)
    accumulate_columns<Q, 2>(weights, decay, values, count, d, sums, record);
  for (; d < dim; d += WIDTH) accumulate_columns<Q, 1>(weights, decay, values, count, d, sums, record);
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

// Q query rows against one tile of KV rows, of which query row q sees seen[q].
template <int Q, class T>
static void attend_rows(const float* query, const T* const* keys, const T* const* values, const Span* seen,
                        const Bend& bend, const Shape& shape, float* weights, float* records) {
  const int64_t dim = round_up(shape.dim, WIDTH);
  float decay[Q];
  for (int64_t j = seen[0].begin / 4 * 4; j < seen[Q - 1].end; j += 4)
    score_four<Q>(query, keys + j, shape.padded_dim, dim, weights + j);
  for (int q = 0; q < Q; ++q)
    decay[q] = seen[q].empty() ? 1.0f
                               : softmax_step(weights + q * TILE, seen[q], bend, records + q * shape.record);
  float* sums = records + RECORD_HEAD;
  auto alone = [&](int q, Span rows) {
    if (rows.empty()) return;
    accumulate<1>(weights + q * TILE + rows.begin, decay + q, values + rows.begin, rows.end - rows.begin, dim,
                  sums + q * shape.record, shape.record);
    decay[q] = 1.0f;
  };
  // What all see is read once for all; before and behind it, each goes alone, so that all add row after row.
  const Span common = {seen[Q - 1].begin, seen[0].end};
  if (common.empty()) {
    for (int q = 0; q < Q; ++q) alone(q, seen[q]);
    return;
  }
  for (int q = 0; q < Q - 1; ++q) alone(q, {seen[q].begin, common.begin});
  accumulate<Q>(weights + common.begin, decay, values + common.begin, common.end - common.begin, dim, sums,
                shape.record);
  for (int q = 0; q < Q; ++q) decay[q] = 1.0f;
  for (int q = 1; q < Q; ++q) alone(q, {common.end, seen[q].end});
}

template <class T>
static void attend_tile(const float* query, const T* const* keys, const T* const* values, int64_t first_row,
                        const Sight& sight, const Bend& bend, const Shape& shape, float* weights, float* records) {
  for (int64_t r = 0, count; r < shape.rows; r += count) {
    const int64_t left = shape.rows - r;
    count = left == MAX_QUERY_ROWS + 1 ? left / 2 : smaller(MAX_QUERY_ROWS, left);  // 2 + 2 is quicker than 3 + 1
    Span seen[MAX_QUERY_ROWS] = {};
    for (int64_t q = 0; q < count; ++q) {
      const Span rows = sight(r + q);
      seen[q] = {smaller(larger(rows.begin - first_row, 0), TILE), smaller(larger(rows.end - first_row, 0), TILE)};
    }
    if (seen[0].begin >= seen[count - 1].end) continue;
    const float* rows = query + r * shape.padded_dim;
    float* states = records + r * shape.record;
    switch (count) {
      case 1: attend_rows<1>(rows, keys, values, seen, bend, shape, weights, states); break;
      case 2: attend_rows<2>(rows, keys, values, seen, bend, shape, weights, states); break;
      default:
        if constexpr (MAX_QUERY_ROWS >= 4) {
          if (count == 4) {
            attend_rows<4>(rows, keys, values, seen, bend, shape, weights, states);
            break;
          }
        }
        if constexpr (MAX_QUERY_ROWS >= 3) attend_rows<3>(rows, keys, values, seen, bend, shape, weights, states);
    }
  }
}

}  // namespace KVARTO_ISA
}  // namespace kvarto
