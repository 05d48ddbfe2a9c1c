// Attention of one tile of query rows over one KV head's blocks. Built once per instruction set.
//
// Every query row goes through the same operations on the same operands whatever tile, batch or
// thread it is in: a dot product accumulates in WIDTH lanes over head_dim and is reduced in one
// fixed order; tiles and chunks of KV rows lie at fixed row numbers; V is added row after row;
// chunks are folded in order. Rows the query does not see are never multiplied in, not even by 0.
#include "abi.h"
#include "simd.h"

namespace kvarto {
namespace KVARTO_ISA {

constexpr float NEG_INFINITY = -__builtin_inff();

KVARTO_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
KVARTO_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

struct Shape {
  int64_t dim, padded_dim, record, group, rows;

  Shape(const KvartoAttention& call, const AttentionTile& tile)
      : dim(call.cache.head_dim),
        padded_dim(round_up(dim, DIM_ALIGN)),
        record(RECORD_HEAD + padded_dim),
        group(call.num_heads / call.cache.num_kv_heads),
        rows(tile.num_queries * group) {}
};

// Per-thread memory; attention.cpp sizes it.
struct Scratch {
  float *query, *chunk, *running, *weights, *keys, *values;

  Scratch(float* memory, const Shape& shape) {
    query = memory;
    chunk = query + shape.rows * shape.padded_dim;
    running = chunk + shape.rows * shape.record;
    weights = running + shape.rows * shape.record;
    keys = weights + MAX_QUERY_ROWS * TILE;
    values = keys + TILE * shape.padded_dim;
  }
};

// Finds the K and V rows of one sequence and KV head.
template <class T>
struct RowFinder {
  const T* head;  // this layer and KV head in block 0
  const int32_t* block_table;
  int64_t block_stride, value_offset, dim, block_mask;
  int block_shift;

  RowFinder(const KvartoAttention& call, const AttentionTile& tile) {
    const KvartoCache& cache = call.cache;
    const int64_t head_stride = cache.block_size * cache.head_dim;
    value_offset = cache.num_kv_heads * head_stride;
    block_stride = cache.num_layers * 2 * value_offset;
    head = (const T*)cache.data + call.layer * 2 * value_offset + tile.kv_head * head_stride;
    block_table = tile.block_table;
    dim = cache.head_dim;
    block_mask = cache.block_size - 1;
    block_shift = __builtin_ctzll(cache.block_size);
  }

  __attribute__((always_inline)) const T* key(int64_t row) const {
    return head + (int64_t)block_table[row >> block_shift] * block_stride + (row & block_mask) * dim;
  }
};

// Widened, scaled by scale * log2(e) so that the softmax may use powers of two, and zero-padded.
template <class T>
static void load_queries(const KvartoAttention& call, const AttentionTile& tile, const Shape& shape, float* out) {
  const Vec scale = set1(call.scale * 1.4426950408889634f);
  for (int64_t r = 0; r < shape.rows; ++r) {
    const T* query = (const T*)call.query + (tile.first_token + r / shape.group) * call.query_stride +
                     (tile.kv_head * shape.group + r % shape.group) * shape.dim;
    for (int64_t d = 0; d < shape.padded_dim; d += WIDTH) {
      const int64_t left = shape.dim - d;
      store(out + r * shape.padded_dim + d, left > 0 ? mul(load_some(query + d, left), scale) : zero());
    }
  }
}

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

// Turns `seen` scores (the rest of the tile is not looked at) into weights exp2(score - max),
// updates max and sum of the record and returns by how much earlier weights shrink.
static float softmax_step(float* scores, int64_t seen, float* record) {
  for (int64_t j = seen; j < round_up(seen, WIDTH); ++j) scores[j] = NEG_INFINITY;
  Vec highest = set1(record[0]);
  for (int64_t j = 0; j < seen; j += WIDTH) highest = max(highest, load(scores + j));
  const float new_max = reduce_max(highest);
  Vec total = zero();
  for (int64_t j = 0; j < seen; j += WIDTH) {
    const Vec weight = exp2(sub(load(scores + j), set1(new_max)));
    store(scores + j, weight);
    total = add(total, weight);
  }
  const float decay = exp2(record[0] - new_max);
  record[0] = new_max;
  record[1] = record[1] * decay + reduce_add(total);
  return decay;
}

// Q query rows against one tile of KV rows; seen[q] of its rows are visible to query row q.
template <int Q, class T>
static void attend_rows(const float* query, const T* const* keys, const T* const* values, const int64_t* seen,
                        const Shape& shape, float* weights, float* records) {
  const int64_t dim = round_up(shape.dim, WIDTH);
  float decay[Q];
  for (int64_t j = 0; j < seen[Q - 1]; j += 4)
    score_four<Q>(query, keys + j, shape.padded_dim, dim, weights + j);
  for (int q = 0; q < Q; ++q)
    decay[q] = seen[q] > 0 ? softmax_step(weights + q * TILE, seen[q], records + q * shape.record) : 1.0f;
  float* sums = records + RECORD_HEAD;
  const int64_t common = seen[0];
  accumulate<Q>(weights, decay, values, common, dim, sums, shape.record);
  const float keep = 1.0f;
  for (int q = 1; q < Q; ++q)
    if (seen[q] > common)
      accumulate<1>(weights + q * TILE + common, &keep, values + common, seen[q] - common, dim,
                    sums + q * shape.record, shape.record);
}

template <class T>
static void attend_tile(const float* query, const T* const* keys, const T* const* values, int64_t first_row,
                        int64_t first_visible, const Shape& shape, float* weights, float* records) {
  for (int64_t r = 0, count; r < shape.rows; r += count) {
    const int64_t left = shape.rows - r;
    count = left == MAX_QUERY_ROWS + 1 ? left / 2 : smaller(MAX_QUERY_ROWS, left);  // 2 + 2 is quicker than 3 + 1
    int64_t seen[MAX_QUERY_ROWS] = {};
    for (int64_t q = 0; q < count; ++q) {
      const int64_t visible = first_visible + (r + q) / shape.group - first_row;
      seen[q] = visible < 0 ? 0 : smaller(visible, TILE);
    }
    if (seen[count - 1] == 0) continue;
    const float* rows = query + r * shape.padded_dim;
    float* states = records + r * shape.record;
    switch (count) {
      case 1: attend_rows<1>(rows, keys, values, seen, shape, weights, states); break;
      case 2: attend_rows<2>(rows, keys, values, seen, shape, weights, states); break;
      default:
        if constexpr (MAX_QUERY_ROWS >= 4) {
          if (count == 4) {
            attend_rows<4>(rows, keys, values, seen, shape, weights, states);
            break;
          }
        }
        if constexpr (MAX_QUERY_ROWS >= 3) attend_rows<3>(rows, keys, values, seen, shape, weights, states);
    }
  }
}

template <class T>
static void widen_row(const T* in, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; d += WIDTH) store(out + d, load_some(in + d, dim - d));
}

// KV rows [begin, end), end - begin <= CHUNK, into the records, which start out empty.
template <class T>
static void attend_chunk(const AttentionTile& tile, const Shape& shape, const RowFinder<T>& rows, int64_t begin,
                         int64_t end, const Scratch& scratch, float* records) {
  for (int64_t r = 0; r < shape.rows; ++r) {
    float* record = records + r * shape.record;
    memset(record, 0, shape.record * sizeof(float));
    record[0] = NEG_INFINITY;
  }
  // Many query rows pay for widening K and V once; and a last partial vector must not be read from the cache.
  const bool widen = shape.rows > 2 * MAX_QUERY_ROWS || shape.dim % WIDTH != 0;
  for (int64_t first = begin; first < end; first += TILE) {
    const T *keys[TILE], *values[TILE];
    const float *wide_keys[TILE], *wide_values[TILE];
    const int64_t count = smaller(TILE, end - first);
    for (int64_t j = 0; j < TILE; ++j) {
      // Rows are scored in fours: what lies behind the last one stands in for it, and is masked.
      keys[j] = rows.key(first + smaller(j, count - 1));
      values[j] = keys[j] + rows.value_offset;
    }
    for (int64_t j = first + TILE; j < smaller(first + 2 * TILE, end); ++j) {
      const char* next = (const char*)rows.key(j);
      for (int64_t byte = 0; byte < shape.dim * (int64_t)sizeof(T); byte += 64) {
        prefetch(next + byte);
        prefetch(next + rows.value_offset * sizeof(T) + byte);
      }
    }
    if (!widen) {
      attend_tile(scratch.query, keys, values, first, tile.first_visible, shape, scratch.weights, records);
      continue;
    }
    for (int64_t j = 0; j < TILE; ++j) {
      wide_keys[j] = scratch.keys + smaller(j, count - 1) * shape.padded_dim;
      wide_values[j] = scratch.values + smaller(j, count - 1) * shape.padded_dim;
    }
    for (int64_t j = 0; j < count; ++j) {
      widen_row(keys[j], shape.dim, scratch.keys + j * shape.padded_dim);
      widen_row(values[j], shape.dim, scratch.values + j * shape.padded_dim);
    }
    attend_tile(scratch.query, wide_keys, wide_values, first, tile.first_visible, shape, scratch.weights, records);
  }
}

// Folds a chunk's record into the record of all chunks before it.
static void fold(const float* chunk, const Shape& shape, float* running) {
  const float new_max = chunk[0] > running[0] ? chunk[0] : running[0];
  const float keep = exp2(running[0] - new_max), take = exp2(chunk[0] - new_max);
  running[0] = new_max;
  running[1] = running[1] * keep + chunk[1] * take;
  for (int64_t d = RECORD_HEAD; d < shape.record; d += WIDTH)
    store(running + d, fma(load(chunk + d), set1(take), mul(load(running + d), set1(keep))));
}

template <class T>
static void write_out(const KvartoAttention& call, const AttentionTile& tile, const Shape& shape, int64_t r,
                      const float* record) {
  const Vec inverse = set1(1.0f / record[1]);
  T* out = (T*)call.out + ((tile.first_token + r / shape.group) * call.num_heads + tile.kv_head * shape.group +
                           r % shape.group) * shape.dim;
  for (int64_t d = 0; d < shape.dim; d += WIDTH)
    store_some(out + d, mul(load(record + RECORD_HEAD + d), inverse), shape.dim - d);
}

template <class T>
static void attend(const KvartoAttention& call, const AttentionTile& tile, float* memory) {
  const Shape shape(call, tile);
  const Scratch scratch(memory, shape);
  const RowFinder<T> rows(call, tile);
  const int64_t visible = tile.first_visible + tile.num_queries - 1;
  load_queries<T>(call, tile, shape, scratch.query);
  for (int64_t chunk = tile.chunk_begin; chunk < tile.chunk_end; ++chunk) {
    const int64_t begin = chunk * CHUNK, end = smaller(begin + CHUNK, visible);
    float* records = scratch.chunk;
    if (tile.partial) records = tile.partial + (chunk - tile.chunk_begin) * shape.rows * shape.record;
    else if (chunk == 0) records = scratch.running;
    attend_chunk(tile, shape, rows, begin, end, scratch, records);
    if (tile.partial || chunk == 0) continue;
    for (int64_t r = 0; r < shape.rows; ++r)
      if (tile.first_visible + r / shape.group > begin)
        fold(records + r * shape.record, shape, scratch.running + r * shape.record);
  }
  if (tile.partial) return;
  for (int64_t r = 0; r < shape.rows; ++r) write_out<T>(call, tile, shape, r, scratch.running + r * shape.record);
}

template <class T>
static void combine(const KvartoAttention& call, const AttentionTile& tile, float* running) {
  const Shape shape(call, tile);
  for (int64_t r = 0; r < shape.rows; ++r) {
    memcpy(running, tile.partial + r * shape.record, shape.record * sizeof(float));
    for (int64_t chunk = 1; chunk < tile.chunk_end; ++chunk)
      if (tile.first_visible + r / shape.group > chunk * CHUNK)
        fold(tile.partial + (chunk * shape.rows + r) * shape.record, shape, running);
    write_out<T>(call, tile, shape, r, running);
  }
}

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {{attend<float>, attend<bf16>, attend<f16>},
                                            {combine<float>, combine<bf16>, combine<f16>}};

}  // namespace KVARTO_ISA
}  // namespace kvarto
