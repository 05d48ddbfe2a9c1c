// From the scores of a tile of KV rows to their weights: one step of an online softmax (Milakov and Gimelshein 2018).
#pragma once

#include "attention_rows.h"

namespace kvarto {
namespace KVARTO_ISA {

constexpr float LOG2_E = 1.4426950408889634f;
constexpr float NEG_INFINITY = -__builtin_inff();
static_assert(TILE % WIDTH == 0 && WIDTH <= RECORD_HEAD - RECORD_SUM, "a tile and a sum fit into vectors");

// What is done to scores before the softmax, and to weights after it.
struct Bend {
  float factor, soft_cap;
  const RowScales* scales;  // null: rows are not quantized

  // Scores come out times log2(e), so that weights are powers of two.
  Bend(const KvartoAttention& call, const RowScales* row_scales)
      : factor(call.soft_cap > 0.0f ? call.scale / call.soft_cap : call.scale * LOG2_E),
        soft_cap(call.soft_cap * LOG2_E),
        scales(row_scales) {}

  KVARTO_MEMBER Vec score(Vec score, int64_t place) const {
    const Vec by = scales ? mul(set1(factor), load(scales->keys + place)) : set1(factor);
    return soft_cap > 0.0f ? mul(set1(soft_cap), tanh(mul(score, by))) : mul(score, by);
  }
  KVARTO_MEMBER Vec weight(Vec weight, int64_t place) const {
    return scales ? mul(weight, load(scales->values + place)) : weight;
  }
};

// A record before it has seen anything.
KVARTO_INLINE void clear(const Shape& shape, float* record) {
  memset(record, 0, shape.record * sizeof(float));
  record[0] = NEG_INFINITY;
}

KVARTO_INLINE void clear_all(const Shape& shape, float* records) {
  for (int64_t r = 0; r < shape.all_rows(); ++r) clear(shape, records + r * shape.record);
}

// A record keeps the max that its sums are relative to until a score is this much higher: it then still holds all it has
// to, and most tiles need neither their own max nor a change of what was summed.
constexpr float HEADROOM = 8.0f;

// Turns the scores of a tile into weights exp2(score - max) in their place, as Weight, and adds them to the record's
// sum. Scores that are not seen may be anything; their weights are 0.
template <class Weight>
static inline void softmax_step(float* scores, Span seen, const Bend& bend, const Shape& shape, float* record) {
  constexpr int64_t VECTORS = TILE / WIDTH;
  Vec parts[VECTORS];
  for (int64_t i = 0; i < VECTORS; ++i) parts[i] = bend.score(load(scores + i * WIDTH), i * WIDTH);
  if (seen.begin > 0 || seen.end < TILE)
    for (int64_t i = 0; i < VECTORS; ++i)
      parts[i] = between(seen.begin - i * WIDTH, seen.end - i * WIDTH, parts[i], set1(NEG_INFINITY));
  Vec best = parts[0];
  for (int64_t i = 1; i < VECTORS; ++i) best = max(best, parts[i]);
  if (any_greater(best, set1(record[0] + HEADROOM))) {
    const float highest = reduce_max(best);
    const Vec decay = exp2(set1(record[0] - highest));
    record[0] = highest;
    for (int64_t d = RECORD_SUM; d < shape.record; d += WIDTH) store(record + d, mul(load(record + d), decay));
  }
  const Vec top = set1(record[0]);
  Vec sum = load(record + RECORD_SUM);
  for (int64_t i = 0; i < VECTORS; ++i) {
    const Vec weight = exp2(sub(parts[i], top));
    sum = add(sum, weight);
    store((Weight*)scores + i * WIDTH, bend.weight(weight, i * WIDTH));
  }
  store(record + RECORD_SUM, sum);
}

// Folds a record into that of all KV rows before its.
KVARTO_INLINE void fold(const Shape& shape, const float* record, float* running) {
  const float new_max = record[0] > running[0] ? record[0] : running[0];
  const Vec keep = exp2(set1(running[0] - new_max)), take = exp2(set1(record[0] - new_max));
  running[0] = new_max;
  for (int64_t d = RECORD_SUM; d < shape.record; d += WIDTH)
    store(running + d, fma(load(record + d), take, mul(load(running + d), keep)));
}

}  // namespace KVARTO_ISA
}  // namespace kvarto
