// Attention of one tile of query rows over one KV head's blocks. Built once per instruction set.
//
// Every query row goes through the same operations on the same operands whatever tile, batch or
// thread it is in: a dot product accumulates in WIDTH lanes over head_dim and is reduced in one
// fixed order; tiles and chunks of KV rows lie at fixed row numbers; V is added row after row;
// the sinks behind the window and then the chunks are folded in order. Rows the query does not see
// are never multiplied in, not even by 0, and those that no query row of the tile sees are not read.
#include "attention_tile.h"

namespace kvarto {
namespace KVARTO_ISA {

static void clear(const Shape& shape, float* records) {
  memset(records, 0, shape.rows * shape.record * sizeof(float));
  for (int64_t r = 0; r < shape.rows; ++r) records[r * shape.record] = NEG_INFINITY;
}

// The KV rows of the sinks or of one chunk, into the records.
template <class T>
static void attend_piece(const KvartoAttention& call, const Sight& sight, const Shape& shape,
                         const RowFinder<T>& rows, const Scratch& scratch, float* records) {
  const Span all = {sight(0).begin, sight(shape.rows - 1).end};
  const bool turned = sight.far && call.cos;
  // Many query rows pay for widening K and V once; and a last partial vector must not be read from the cache.
  const bool widen = shape.rows > 2 * MAX_QUERY_ROWS || shape.dim % WIDTH != 0 || turned;
  RowScales scales;
  const Bend bend = {call.soft_cap, QUANTIZED<T> ? &scales : nullptr};
  clear(shape, records);
  for (int64_t first = all.begin / TILE * TILE; first < all.end; first += TILE) {
    const T *keys[TILE], *values[TILE];
    const float *wide_keys[TILE], *wide_values[TILE];
    const Span held = {larger(all.begin - first, 0), smaller(TILE, all.end - first)};
    for (int64_t j = first + TILE; j < smaller(first + 2 * TILE, all.end); ++j) {
      const char* next = (const char*)rows.key(j);
      for (int64_t byte = 0; byte < rows.row_bytes; byte += 64) {
        prefetch(next + byte);
        prefetch(next + rows.value_bytes + byte);
      }
      if (QUANTIZED<T> && j % 8 == 0) {
        prefetch(rows.key_scale(j));
        prefetch(rows.key_scale(j) + rows.value_bytes);
      }
    }
    for (int64_t j = held.begin; j < held.end; ++j) keys[j] = rows.key(first + j);
    if constexpr (QUANTIZED<T>)
      for (int64_t j = held.begin; j < held.end; ++j) scales.load(rows, j, first + j);
    // Rows are scored in fours: what lies around those that are seen is stood in for by the nearest, and is masked.
    for (int64_t j = held.begin / 4 * 4; j < held.begin; ++j) keys[j] = keys[held.begin];
    for (int64_t j = held.end; j < round_up(held.end, 4); ++j) keys[j] = keys[held.end - 1];
    for (int64_t j = held.begin; j < held.end; ++j) values[j] = rows.value_of(keys[j]);
    if (!widen) {
      attend_tile(scratch.query, keys, values, first, sight, bend, shape, scratch.weights, records);
      continue;
    }
    for (int64_t j = 0; j < TILE; ++j) {
      const int64_t place = larger(held.begin, smaller(j, held.end - 1));
      wide_keys[j] = scratch.keys + place * shape.padded_dim;
      wide_values[j] = scratch.values + place * shape.padded_dim;
    }
    for (int64_t j = held.begin; j < held.end; ++j) {
      float* key = scratch.keys + j * shape.padded_dim;
      widen_row(keys[j], shape.dim, key);
      widen_row(values[j], shape.dim, scratch.values + j * shape.padded_dim);
      const int64_t angles = (first + j) * call.num_angles;
      if (turned) turn_back(key, call.cos + angles, call.sin + angles, call.num_angles);
    }
    attend_tile(scratch.query, wide_keys, wide_values, first, sight, bend, shape, scratch.weights, records);
  }
}

// Folds the records of a piece into those of all pieces before it, where the query row sees any of it.
static void fold(const Sight& sight, const Shape& shape, int64_t r, const float* piece, float* running) {
  if (sight(r).empty()) return;
  const float new_max = piece[0] > running[0] ? piece[0] : running[0];
  const float keep = exp2(running[0] - new_max), take = exp2(piece[0] - new_max);
  running[0] = new_max;
  running[1] = running[1] * keep + piece[1] * take;
  for (int64_t d = RECORD_HEAD; d < shape.record; d += WIDTH)
    store(running + d, fma(load(piece + d), set1(take), mul(load(running + d), set1(keep))));
}

template <class T>
static void write_out_as(const KvartoAttention& call, const AttentionTile& tile, const Shape& shape, int64_t r,
                         const float* record) {
  const Vec inverse = set1(1.0f / record[1]);
  T* out = (T*)call.out + ((tile.first_token + r / shape.group) * call.num_heads + tile.kv_head * shape.group +
                           r % shape.group) * shape.dim;
  for (int64_t d = 0; d < shape.dim; d += WIDTH)
    store_some(out + d, mul(load(record + RECORD_HEAD + d), inverse), shape.dim - d);
}

static void write_out(const KvartoAttention& call, const AttentionTile& tile, const Shape& shape, int64_t r,
                      const float* record) {
  switch (call.dtype) {
    case KVARTO_BF16: return write_out_as<bf16>(call, tile, shape, r, record);
    case KVARTO_F16: return write_out_as<f16>(call, tile, shape, r, record);
    default: return write_out_as<float>(call, tile, shape, r, record);
  }
}

// Calls visit(sight) for the sinks, if they are the tile's, and for its chunks, in order.
template <class Visit>
KVARTO_INLINE void each_piece(const KvartoAttention& call, const AttentionTile& tile, const Shape& shape, Visit visit) {
  if (tile.sinks) visit(Sight(call, tile, shape, true, 0));
  for (int64_t chunk = tile.chunk_begin; chunk < tile.chunk_end; ++chunk)
    visit(Sight(call, tile, shape, false, chunk));
}

template <class T>
static void attend(const KvartoAttention& call, const AttentionTile& tile, float* memory) {
  const Shape shape(call, tile);
  const Scratch scratch(memory, shape);
  const RowFinder<T> rows(call, tile);
  float* records = tile.partial ? tile.partial : scratch.piece;
  if (!tile.partial) clear(shape, scratch.running);
  bool loaded = false;
  each_piece(call, tile, shape, [&](const Sight& sight) {
    if (!loaded) load_queries(call, tile, shape, sight.far, scratch.query);
    loaded = !sight.far;
    attend_piece(call, sight, shape, rows, scratch, records);
    if (tile.partial) {
      records += shape.rows * shape.record;
      return;
    }
    for (int64_t r = 0; r < shape.rows; ++r)
      fold(sight, shape, r, records + r * shape.record, scratch.running + r * shape.record);
  });
  if (tile.partial) return;
  for (int64_t r = 0; r < shape.rows; ++r) write_out(call, tile, shape, r, scratch.running + r * shape.record);
}

static void combine(const KvartoAttention& call, const AttentionTile& tile, float* running) {
  const Shape shape(call, tile);
  clear(shape, running);
  const float* records = tile.partial;
  each_piece(call, tile, shape, [&](const Sight& sight) {
    for (int64_t r = 0; r < shape.rows; ++r)
      fold(sight, shape, r, records + r * shape.record, running + r * shape.record);
    records += shape.rows * shape.record;
  });
  for (int64_t r = 0; r < shape.rows; ++r) write_out(call, tile, shape, r, running + r * shape.record);
}

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {
    {attend<float>, attend<bf16>, attend<f16>, attend<i8>, attend<f8>}, combine};

}  // namespace KVARTO_ISA
}  // namespace kvarto
