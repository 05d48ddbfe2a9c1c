// What one tile of query rows gives to one KV head's rows. Built once per instruction set.
//
// As in attention_isa.cpp, a query row goes through the same operations whatever tile, batch or thread it is in, and a
// score that is computed twice comes out the same: whether scores were kept does not show in the result.
#include "attention_scores.h"
#include "attention_softmax.h"
#include "sparsity.h"

namespace kvarto {
namespace KVARTO_ISA {

// Per-thread memory; scores.cpp sizes it.
struct ScoreScratch {
  float* query;  // or of another type, in as many elements
  float *scores, *keys;
  Span* seen;
  SoftmaxState* states;

  ScoreScratch(float* memory, const Shape& shape) {
    query = memory;
    scores = query + shape.rows * shape.padded_dim * QUERY_FLOATS;
    keys = scores + shape.rows * TILE;
    seen = (Span*)(keys + TILE * shape.padded_dim);
    states = (SoftmaxState*)(seen + shape.rows);
  }
};

static void prefetch_keys(const RowFinder& rows, int64_t begin, int64_t end) {
  for (int64_t j = begin; j < end; ++j) {
    const char* key = rows.key(j);
    for (int64_t byte = 0; byte < rows.row_bytes; byte += 64) prefetch(key + byte);
    if (rows.scaled && j % RUN == 0) prefetch(rows.key_scale(j));
  }
}

// A tile of keys as floats.
template <class T>
static TileRows<float> widen_keys(const TileRows<T>& keys, int64_t held, const Shape& shape, float* wide) {
  for (int64_t j = 0; j < held; ++j) widen_key(keys[j], shape.dim, wide + j * shape.padded_dim);
  TileRows<float> rows;
  for (int64_t i = 0; i < TILE / RUN; ++i) rows.runs[i] = wide + i * RUN * shape.padded_dim;
  rows.stride = shape.padded_dim;
  return rows;
}

template <class T>
static void load_scored(const KvartoAttention& call, const AttentionTile& tile, const Shape& shape, float* query) {
  load_queries(call, tile, shape, false, (typename QueryFor<T>::type*)query);
}

// Calls visit(r, place, count, scores) for each query row r and each tile of KV rows that it sees some of: the first
// `count` of those at `place` in the chunk. Behind them the scores are -infinity, up to a whole vector.
template <class T, class Visit>
KVARTO_INLINE void each_score(const KvartoAttention& call, const AttentionTile& tile, const Shape& shape,
                              const ScoreScratch& scratch, int64_t chunk, Visit visit) {
  using Query = typename QueryFor<T>::type;
  const RowFinder rows(call, tile, sizeof(T), QUANTIZED<T>);
  const int64_t begin = chunk * CHUNK, end = smaller(begin + CHUNK, tile.first_visible + tile.num_queries - 1);
  // As in attention_isa.cpp.
  const bool wide = sizeof(Query) == sizeof(float) && (shape.rows > 2 * MAX_QUERY_ROWS || shape.dim % WIDTH != 0);
  RowScales scales;
  const Bend bend(call, QUANTIZED<T> ? &scales : nullptr);
  for (int64_t first = begin; first < end; first += TILE) {
    const Span held = {0, smaller(TILE, end - first)};
    prefetch_keys(rows, first + TILE, smaller(first + 2 * TILE, end));
    const Places places = rows.locate(first, held);
    const TileRows<T> keys = rows.keys<T>(places, 0);
    if (QUANTIZED<T>) scales.load(rows, places, 0);
    for (int64_t r = 0; r < shape.rows; ++r)
      scratch.seen[r] = {0, smaller(larger(tile.first_visible + r / shape.group - first, 0), TILE)};
    if (wide) {
      const TileRows<float> widened = widen_keys(keys, held.end, shape, scratch.keys);
      score(scratch.query, widened, scratch.seen, shape, scratch.scores, nullptr, nullptr);
    } else {
      score((const Query*)scratch.query, keys, scratch.seen, shape, scratch.scores, scratch.keys, nullptr);
    }
    for (int64_t r = 0; r < shape.rows; ++r) {
      const int64_t count = scratch.seen[r].end;
      if (count == 0) continue;
      float* scores = scratch.scores + r * TILE;
      for (int64_t j = 0; j < count; j += WIDTH) store(scores + j, bend.score(load(scores + j), j));
      for (int64_t j = count; j < round_up(count, WIDTH); ++j) scores[j] = NEG_INFINITY;
      visit(r, first - begin, count, scores);
    }
  }
}

static float exp2(float x) { return reduce_max(exp2(set1(x))); }

static void update(const float* scores, int64_t count, SoftmaxState& state) {
  Vec highest = set1(state.largest);
  for (int64_t j = 0; j < count; j += WIDTH) highest = max(highest, load(scores + j));
  const float largest = reduce_max(highest);
  Vec total = zero();
  for (int64_t j = 0; j < count; j += WIDTH) total = add(total, exp2(sub(load(scores + j), set1(largest))));
  state.sum = state.sum * exp2(state.largest - largest) + reduce_add(total);
  state.largest = largest;
}

static void clear(SoftmaxState* states, int64_t num_rows) {
  for (int64_t r = 0; r < num_rows; ++r) states[r] = {NEG_INFINITY, 0.0f};
}

static void fold(const SoftmaxState* later, int64_t num_rows, SoftmaxState* states) {
  for (int64_t r = 0; r < num_rows; ++r) {
    if (later[r].sum == 0.0f) continue;  // the row sees nothing there
    const float largest = later[r].largest > states[r].largest ? later[r].largest : states[r].largest;
    const float keep = exp2(states[r].largest - largest), take = exp2(later[r].largest - largest);
    states[r] = {largest, states[r].sum * keep + later[r].sum * take};
  }
}

template <class T>
static void measure(const KvartoAttention& call, const AttentionTile& tile, float* kept, SoftmaxState* states,
                    float* memory) {
  const Shape shape(call, tile);
  const ScoreScratch scratch(memory, shape);
  load_scored<T>(call, tile, shape, scratch.query);
  clear(states, shape.rows);
  for (int64_t chunk = tile.chunk_begin; chunk < tile.chunk_end; ++chunk) {
    clear(scratch.states, shape.rows);
    each_score<T>(call, tile, shape, scratch, chunk, [&](int64_t r, int64_t place, int64_t count, const float* scores) {
      const int64_t kept_place = (chunk * shape.rows + r) * CHUNK + place;
      if (kept) memcpy(kept + kept_place, scores, round_up(count, WIDTH) * sizeof(float));
      update(scores, count, scratch.states[r]);
    });
    fold(scratch.states, shape.rows, states);
  }
}

template <class T>
static void give(const KvartoAttention& call, const AttentionTile& tile, const float* kept, const SoftmaxState* states,
                 float* received, float* memory) {
  const Shape shape(call, tile);
  const int64_t chunk = tile.chunk_begin;
  auto add_row = [&](int64_t r, int64_t place, int64_t count, const float* scores) {
    const Vec largest = set1(states[r].largest), inverse = set1(1.0f / states[r].sum);
    for (int64_t j = 0; j < count; j += WIDTH) {
      const Vec probability = mul(exp2(sub(load(scores + j), largest)), inverse);
      store(received + place + j, add(load(received + place + j), probability));
    }
  };
  if (kept) {
    const float* scores = kept + chunk * shape.rows * CHUNK;
    for (int64_t r = 0; r < shape.rows; ++r)
      add_row(r, 0, smaller(CHUNK, tile.first_visible + r / shape.group - chunk * CHUNK), scores + r * CHUNK);
    return;
  }
  const ScoreScratch scratch(memory, shape);
  load_scored<T>(call, tile, shape, scratch.query);
  each_score<T>(call, tile, shape, scratch, chunk, add_row);
}

extern const ScoreKernels score_kernels;
const ScoreKernels score_kernels = {
    {measure<float>, measure<bf16>, measure<f16>, measure<i8>, measure<f8>},
    {give<float>, give<bf16>, give<f16>, give<i8>, give<f8>},
    fold};

}  // namespace KVARTO_ISA
}  // namespace kvarto
