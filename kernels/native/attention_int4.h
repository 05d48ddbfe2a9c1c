// Attention over an int4 cache and the residual beside it: tile by tile, rows become floats first.
//
// The largest code and zero have 8 bits and so has a scale: (code - zero) * scale is exact in float32, and so is
// code * scale - zero * scale, fused or not.
#pragma once

#include "attention_scores.h"
#include "attention_softmax.h"
#include "attention_values.h"
#include "int4.h"

namespace kvarto {
namespace KVARTO_ISA {

// Makes `wide`, rows padded_dim apart, of a tile's quantized rows.
class Int4Rows {
 public:
  Int4Rows(const KvartoAttention& call, const AttentionTile& tile)
      : block_table_(tile.block_table),
        block_size_(call.cache.block_size),
        dim_(call.cache.head_dim),
        half_(dim_ / 2),
        padded_dim_(round_up(dim_, DIM_ALIGN)),
        block_shift_(__builtin_ctzll(block_size_)),
        head_(int4_head(block_size_, dim_)),
        block_bytes_(call.cache.num_layers * call.cache.num_kv_heads * head_.bytes),
        layer_((const char*)call.cache.data + (call.layer * call.cache.num_kv_heads + tile.kv_head) * head_.bytes) {}

  void keys(int64_t first, Span held, int64_t head, float* wide) const {
    each_block(first, held, head, [&](const char* block, int64_t offset, int64_t place, int64_t count) {
      // Of all channels. Those past the last are 0: what lies behind a row of codes becomes 0.
      float scales[MAX_HEAD_DIM + WIDTH], biases[MAX_HEAD_DIM + WIDTH];
      for (int64_t d = 0; d < dim_; d += WIDTH) {
        const Vec scale = load_some((const bf16*)(block + head_.key_scales) + d, dim_ - d);
        store(scales + d, scale);
        store(biases + d, bias(scale, load_some((const i8*)(block + head_.key_zeros) + d, dim_ - d)));
      }
      store(scales + dim_, zero()), store(biases + dim_, zero());
      each_columns([&](int64_t d) __attribute__((always_inline)) {
        const Vec low_scale = load(scales + d), low_bias = load(biases + d);
        const Vec high_scale = load(scales + half_ + d), high_bias = load(biases + half_ + d);
        const uint8_t* codes = (const uint8_t*)block + offset * half_ + d;
        float* out = wide + place * padded_dim_ + d;
        for (int64_t j = 0; j < count; ++j, codes += half_, out += padded_dim_) {
          Vec low, high;
          load_nibbles(codes, low, high);
          store(out, fma(low, low_scale, low_bias));
          store(out + half_, fma(high, high_scale, high_bias));
        }
      });
    });
  }

  void values(int64_t first, Span held, int64_t head, float* wide) const {
    each_block(first, held, head, [&](const char* block, int64_t offset, int64_t place, int64_t count) {
      for (int64_t j = 0; j < count; ++j) {
        const Vec row_scale = set1(to_float(((const bf16*)(block + head_.value_scales))[offset + j]));
        const Vec row_bias = bias(row_scale, set1((float)value_zero(block, offset + j)));
        const uint8_t* codes = (const uint8_t*)block + head_.value_codes + (offset + j) * half_;
        float* out = wide + (place + j) * padded_dim_;
        each_columns([&](int64_t d) __attribute__((always_inline)) {
          Vec low, high;
          load_nibbles(codes + d, low, high);
          store(out + d, fma(low, row_scale, row_bias));
          store(out + half_ + d, fma(high, row_scale, row_bias));
        });
      }
    });
  }

  // A head of the tile's blocks, into the nearest cache.
  void fetch(int64_t first, Span held, int64_t head) const {
    each_block(first, held, head, [&](const char* block, int64_t, int64_t, int64_t) {
      for (int64_t line = 0; line < head_.bytes; line += 64) prefetch(block + line);
    });
  }

 private:
  static KVARTO_MEMBER float to_float(bf16 x) {
    const uint32_t bits = (uint32_t)x.bits << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
  }
  KVARTO_MEMBER int32_t value_zero(const char* block, int64_t row) const {
    const int64_t half = block_size_ / 2;
    const uint8_t pair = ((const uint8_t*)block)[head_.value_zeros + (row & (half - 1))];
    return row < half ? pair & 15 : pair >> 4;
  }
  static KVARTO_MEMBER Vec bias(Vec scale, Vec zero_code) { return sub(zero(), mul(zero_code, scale)); }

  // Calls visit(d) for columns d and half_ + d of every vector, from the last: what a vector of low halves has past the
  // middle is then overwritten. Bytes read behind a row are of the same head; columns behind a row are padding.
  template <class Visit>
  KVARTO_MEMBER void each_columns(Visit visit) const {
    for (int64_t d = (half_ - 1) / WIDTH * WIDTH; d >= 0; d -= WIDTH) visit(d);
  }

  // Calls visit(this head of the block, row in it, place in the tile, number of rows) for each block with rows held.
  template <class Visit>
  KVARTO_MEMBER void each_block(int64_t first, Span held, int64_t head, Visit visit) const {
    for (int64_t place = held.begin, count; place < held.end; place += count) {
      const int64_t row = first + place, offset = row & (block_size_ - 1);
      count = smaller(held.end - place, block_size_ - offset);
      visit(layer_ + (int64_t)block_table_[row >> block_shift_] * block_bytes_ + head * head_.bytes, offset, place,
            count);
    }
  }

  const int32_t* block_table_;
  const int64_t block_size_, dim_, half_, padded_dim_;
  const int block_shift_;
  const Int4Head head_;
  const int64_t block_bytes_;
  const char* layer_;
};

// The same of rows of the residual.
template <class T>
class OwnRows {
 public:
  OwnRows(const KvartoAttention& call, const AttentionTile& tile)
      : dim_(call.residual.head_dim), rows_(as_cache(call), with_table(tile), sizeof(T), false) {}

  void keys(int64_t first, Span held, int64_t head, float* wide) const {
    widen(rows_.keys<T>(rows_.locate(first, held), head), held, wide);
  }
  void values(int64_t first, Span held, int64_t head, float* wide) const {
    widen(rows_.values<T>(rows_.locate(first, held), head), held, wide);
  }
  void fetch(int64_t, Span, int64_t) const {}

 private:
  static KvartoAttention as_cache(KvartoAttention call) {
    call.cache = call.residual;
    call.layer = call.residual_layer;
    return call;
  }
  static AttentionTile with_table(AttentionTile tile) {
    tile.block_table = tile.residual_table;
    return tile;
  }
  void widen(const TileRows<T>& rows, Span held, float* wide) const {
    for (int64_t j = held.begin; j < held.end; ++j) widen_key(rows[j], dim_, wide + j * round_up(dim_, DIM_ALIGN));
  }

  const int64_t dim_;
  const RowFinder rows_;
};

// The KV rows of a piece, into the records. Rows: Int4Rows or OwnRows.
template <class Rows>
static void attend_widened(const KvartoAttention& call, const Sight& sight, const Shape& shape, const Rows& rows,
                           const Scratch& scratch, float* records) {
  const Span all = sight.hull(shape.rows);
  const bool turned = sight.far && call.cos;
  const Bend bend(call, nullptr);
  TileRows<float> widened;
  for (int64_t i = 0; i < TILE / RUN; ++i) widened.runs[i] = scratch.wide + i * RUN * shape.padded_dim;
  widened.stride = shape.padded_dim;
  const auto held_at = [&](int64_t first) -> Span {
    return {larger(all.begin - first, 0), smaller(TILE, all.end - first)};
  };
  for (int64_t first = all.begin / TILE * TILE; first < all.end; first += TILE) {
    const Span held = held_at(first), next = held_at(first + TILE);
    sight.places(first, shape.rows, scratch.seen);
    for (int64_t head = 0; head < shape.heads; ++head) {
      const int64_t row = head * shape.rows;
      float *weights = scratch.weights + row * TILE, *sums = records + row * shape.record;
      rows.fetch(first + TILE, next, head);
      rows.keys(first, held, head, scratch.wide);
      if (turned)
        for (int64_t j = held.begin; j < held.end; ++j) {
          const int64_t angles = (first + j) * call.num_angles;
          turn_back(scratch.wide + j * shape.padded_dim, call.cos + angles, call.sin + angles, call.num_angles);
        }
      score(scratch.query + row * shape.padded_dim, widened, scratch.seen, shape, weights, nullptr, nullptr);
      for (int64_t r = 0; r < shape.rows; ++r)
        if (!scratch.seen[r].empty())
          softmax_step<float>(weights + r * TILE, scratch.seen[r], bend, shape, sums + r * shape.record);
      rows.values(first, held, head, scratch.wide);
      add_values(weights, widened, scratch.seen, shape, sums, nullptr);
    }
  }
}

}  // namespace KVARTO_ISA
}  // namespace kvarto
