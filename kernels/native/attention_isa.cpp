// Attention of one tile of query rows over the blocks of their KV heads. Built once per instruction set.
//
// Every query row goes through the same operations on the same operands whatever tile, batch or
// thread it is in: a dot product accumulates in WIDTH lanes over head_dim and is reduced in one
// fixed order; tiles and chunks of KV rows lie at fixed row numbers; V is added row after row, or pair after pair;
// the sinks behind the window, then the chunks and then what is from the residual are folded in order. Rows the query does not see
// are never multiplied in, not even by 0; of those that no query row of the tile sees, the nearest
// neighbours of seen ones may be read, in the same block.
#include "attention_int4.h"
#include "attention_scores.h"
#include "attention_softmax.h"
#include "attention_values.h"

namespace kvarto {
namespace KVARTO_ISA {

// The KV rows of the sinks or of one chunk, into the records. Of each tile, all KV heads go through one phase after
// another: that is nearly the order in which the rows lie, and one head's softmax waits for no other.
template <class T>
static void attend_piece(const KvartoAttention& call, const Sight& sight, const Shape& shape, const RowFinder& rows,
                         const Scratch& scratch, float* records, Ahead* ahead) {
  using Query = typename QueryFor<T>::type;
  using Weight = typename Weights<T>::type;
  const Span all = {sight(0).begin, sight(shape.rows - 1).end};
  const bool turned = sight.far && call.cos;
  // Many query rows pay for laying out K and V once; and a last partial vector must not be read from the cache.
  const bool wide = !few_rows(shape) || shape.dim % WIDTH != 0;
  const bool wide_keys = turned || (wide && sizeof(Query) == sizeof(float));
  const int64_t row_bytes = 2 * TILE * shape.dim * (int64_t)sizeof(T) / shape.rows;  // of a tile, for each query row
  RowScales scales;
  const Bend bend(call, QUANTIZED<T> ? &scales : nullptr);
  for (int64_t first = all.begin / TILE * TILE; first < all.end; first += TILE) {
    const Span held = {larger(all.begin - first, 0), smaller(TILE, all.end - first)};
    const Places places = rows.locate(first, held);
    if (ahead) ahead->begin_tile(shape, {first + held.begin, first + held.end});
    sight.places(first, shape.rows, scratch.seen);
    for (int64_t head = 0; head < shape.heads; ++head) {
      const TileRows<T> keys = rows.keys<T>(places, head);
      const int64_t row = head * shape.rows;
      float* scores = scratch.weights + row * TILE;
      if (wide_keys) {
        const auto widened = widen<T>(held, shape, scratch.wide, ahead, [&](int64_t j, float* key) {
          widen_key(keys[j], shape.dim, key);
          const int64_t angles = (first + j) * call.num_angles;
          if (turned) turn_back(key, call.cos + angles, call.sin + angles, call.num_angles);
        });
        score(scratch.query + row * shape.padded_dim, widened, scratch.seen, shape, scores, nullptr, nullptr);
      } else {
        const Query* query = query_row((const Query*)scratch.query, shape, row);
        score(query, keys, scratch.seen, shape, scores, scratch.wide, ahead);
      }
    }
    for (int64_t head = 0; head < shape.heads; ++head) {
      if (QUANTIZED<T>) scales.load(rows, places, head);
      for (int64_t r = 0, row = head * shape.rows; r < shape.rows; ++r, ++row) {
        const Span seen = scratch.seen[r];
        if (!seen.empty())
          softmax_step<Weight>(scratch.weights + row * TILE, seen, bend, shape, records + row * shape.record);
        if (ahead) ahead->use_scores(row_bytes);
      }
    }
    for (int64_t head = 0; head < shape.heads; ++head) {
      const TileRows<T> values = rows.values<T>(places, head);
      const int64_t row = head * shape.rows;
      const float* weights = scratch.weights + row * TILE;
      float* sums = records + row * shape.record;
      if (wide)
        add_values(weights, lay_out(values, held, shape, scratch.wide, ahead), scratch.seen, shape, sums, nullptr);
      else
        add_values(weights, values, scratch.seen, shape, sums, ahead);
    }
  }
}

// Folds the records of a piece into those of all pieces before it, where the query row sees any of it.
static void fold_all(const Sight& sight, const Shape& shape, const float* piece, float* running) {
  for (int64_t r = 0; r < shape.all_rows(); ++r)
    if (!sight(r % shape.rows).empty()) fold(shape, piece + r * shape.record, running + r * shape.record);
}

template <class T>
static void write_out_as(const KvartoAttention& call, const AttentionTile& tile, const Shape& shape, int64_t r,
                         const float* record) {
  const Vec inverse = set1(1.0f / reduce_add(load(record + RECORD_SUM)));
  T* out = (T*)call.out + shape.element(call, tile, r, call.num_heads * shape.dim);
  for (int64_t d = 0; d < shape.dim; d += 2 * WIDTH) {
    Vec low, high;
    load_sums(record + RECORD_HEAD, call.cache.dtype, d, shape.dim, low, high);
    store_some(out + d, mul(low, inverse), shape.dim - d);
    if (shape.dim - d > WIDTH) store_some(out + d + WIDTH, mul(high, inverse), shape.dim - d - WIDTH);
  }
}

static void write_out(const KvartoAttention& call, const AttentionTile& tile, const Shape& shape, int64_t r,
                      const float* record) {
  switch (call.dtype) {
    case KVARTO_BF16: return write_out_as<bf16>(call, tile, shape, r, record);
    case KVARTO_F16: return write_out_as<f16>(call, tile, shape, r, record);
    default: return write_out_as<float>(call, tile, shape, r, record);
  }
}

// Calls visit(sight) for those of the sinks, the chunks and the queries' own blocks that are the tile's, in order.
template <class Visit>
KVARTO_INLINE void each_piece(const KvartoAttention& call, const AttentionTile& tile, const Shape& shape, Visit visit) {
  if (tile.sinks) visit(Sight::sinks(call, tile, shape));
  for (int64_t chunk = tile.chunk_begin; chunk < tile.chunk_end; ++chunk)
    visit(Sight::chunk(call, tile, shape, chunk));
  if (tile.own) visit(Sight::own_block(call, tile, shape));
}

// Folds the records of all pieces, in order, and writes out.
static void combine(const KvartoAttention& call, const AttentionTile& tile, float* running) {
  const Shape shape(call, tile);
  clear_all(shape, running);
  const float* records = tile.partial;
  each_piece(call, tile, shape, [&](const Sight& sight) {
    fold_all(sight, shape, records, running);
    records += shape.all_rows() * shape.record;
  });
  for (int64_t r = 0; r < shape.all_rows(); ++r) write_out(call, tile, shape, r, running + r * shape.record);
}

// attend_one(sight, records) attends one piece.
template <class AttendOne>
KVARTO_INLINE void attend_pieces(const KvartoAttention& call, const AttentionTile& tile, const Shape& shape,
                                 const Scratch& scratch, AttendOne attend_one) {
  float* records = tile.partial ? tile.partial : scratch.piece;
  if (!tile.partial) clear_all(shape, scratch.running);
  each_piece(call, tile, shape, [&](const Sight& sight) {
    clear_all(shape, records);
    attend_one(sight, records);
    if (tile.partial) {
      records += shape.all_rows() * shape.record;
      return;
    }
    fold_all(sight, shape, records, scratch.running);
  });
  if (tile.partial) {
    if (__atomic_sub_fetch(&tile.whole->num_left, 1, __ATOMIC_ACQ_REL) == 0)
      combine(call, *tile.whole, scratch.running);
    return;
  }
  for (int64_t r = 0; r < shape.all_rows(); ++r) write_out(call, tile, shape, r, scratch.running + r * shape.record);
}

template <class T>
static void attend(const KvartoAttention& call, const AttentionTile& tile, float* memory, Ahead* ahead) {
  const Shape shape(call, tile);
  const Scratch scratch(memory, shape);
  const RowFinder rows(call, tile, sizeof(T), QUANTIZED<T>);
  bool loaded = false;
  attend_pieces(call, tile, shape, scratch, [&](const Sight& sight, float* records) {
    if (sight.far && call.cos) load_queries(call, tile, shape, true, scratch.query);  // keys that were turned are floats
    else if (!loaded) load_queries(call, tile, shape, sight.far, (typename QueryFor<T>::type*)scratch.query);
    loaded = !sight.far;
    attend_piece<T>(call, sight, shape, rows, scratch, records, sight.far ? nullptr : ahead);
  });
}

template <class T>
static void attend_queue(const KvartoAttention& call, AttentionQueue& queue, float* memory) {
  Ahead ahead(call, queue, sizeof(T), QUANTIZED<T>);
  while (const AttentionTile* tile = ahead.next_tile()) attend<T>(call, *tile, memory, &ahead);
}

template <class T>
static void attend_int4(const KvartoAttention& call, const AttentionTile& tile, float* memory) {
  const Shape shape(call, tile);
  const Scratch scratch(memory, shape);
  const Int4Rows quantized(call, tile);
  const OwnRows<T> own(call, tile);
  bool loaded = false;
  const auto attend_rows = [&](const Sight& sight, const auto& rows, float* records) {
    if (sight.far || !loaded) load_queries(call, tile, shape, sight.far, scratch.query);
    loaded = !sight.far;
    attend_widened(call, sight, shape, rows, scratch, records);
  };
  attend_pieces(call, tile, shape, scratch, [&](const Sight& sight, float* records) {
    if (!sight.own) return attend_rows(sight, quantized, records);
    const Sight sinks = Sight::sinks(call, tile, shape, true);  // few blocks have any
    if (!sinks.hull(shape.rows).empty()) attend_rows(sinks, own, records);
    attend_rows(sight, own, records);
  });
}

template <class T>
static void attend_int4_queue(const KvartoAttention& call, AttentionQueue& queue, float* memory) {
  while (const AttentionTile* tile = take(queue)) attend_int4<T>(call, *tile, memory);
}

static void attend_any_int4_queue(const KvartoAttention& call, AttentionQueue& queue, float* memory) {
  switch (call.residual.dtype) {
    case KVARTO_BF16: return attend_int4_queue<bf16>(call, queue, memory);
    case KVARTO_F16: return attend_int4_queue<f16>(call, queue, memory);
    default: return attend_int4_queue<float>(call, queue, memory);
  }
}

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels = {
    {attend_queue<float>, attend_queue<bf16>, attend_queue<f16>, attend_queue<i8>, attend_queue<f8>,
     attend_any_int4_queue},
};

}  // namespace KVARTO_ISA
}  // namespace kvarto
