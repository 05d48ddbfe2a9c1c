// Cuts the scored queries of a ragged batch into tiles, and shares their two passes over K out among threads.
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "isa.h"

namespace kvarto {
namespace {

constexpr int64_t TARGET_ROWS = 48;  // query rows of a tile: they share each load of K
constexpr int64_t KEPT_FLOATS = 1 << 21;  // scores kept at a time: so many stay in the caches until they are read again

// Grows, never shrinks, so that a step does not pay for fresh pages.
template <class T>
T* reserve(std::vector<T>& memory, int64_t size) {
  if ((int64_t)memory.size() < size) memory.resize(size);
  return memory.data();
}

int32_t check(const KvartoScores& scores, int64_t* detail) {
  const KvartoAttention& call = scores.attention;
  const int32_t* start = call.query_start_loc;
  for (int64_t s = 0; s < call.num_seqs; ++s) {
    *detail = s;
    const int64_t num_queries = (int64_t)start[s + 1] - start[s];
    if (num_queries < 0 || (s == 0 && start[0] != 0)) return KVARTO_BAD_QUERY_START_LOC;
    const int64_t num_blocks = divide_up(call.kv_lens[s], call.cache.block_size);
    if (call.kv_lens[s] < num_queries || num_blocks > call.max_blocks) return KVARTO_BAD_KV_LEN;
    if (scores.num_scored[s] < 0 || scores.num_scored[s] > num_queries) return KVARTO_BAD_NUM_SCORED;
    for (int64_t b = 0; b < num_blocks && scores.num_scored[s] > 0; ++b) {
      const int32_t block_id = call.block_tables[s * call.max_blocks + b];
      if (block_id < 0 || block_id >= call.cache.num_blocks) return KVARTO_BAD_BLOCK_ID;
    }
  }
  *detail = call.num_seqs - 1;
  return start[call.num_seqs] == call.num_tokens ? KVARTO_OK : KVARTO_BAD_QUERY_START_LOC;
}

struct ScoredTile {
  AttentionTile tile;  // with all chunks that it sees
  float* kept;
  SoftmaxState* states;  // [num_parts, rows]; the first becomes that of all
  int64_t num_parts;
};

// One sequence and KV head.
struct Unit {
  int64_t first_tile, end_tile, kv_len;
  float* out;
};

struct MeasureJob {
  AttentionTile tile;
  float* kept;
  SoftmaxState* states;
};

// Sequences that are scored together, for what they keep fits.
class Wave {
 public:
  Wave(const KvartoScores& scores, const ScoreKernels& kernels)
      : call(scores.attention),
        scores(scores),
        kernels(kernels),
        group(call.num_heads / call.cache.num_kv_heads),
        tile_queries(std::max<int64_t>(1, TARGET_ROWS / group)) {}

  // Kept scores of a sequence, [heads, tiles, chunks, rows, CHUNK]; or all there may be, where it has too many to keep.
  int64_t size_of(int64_t s) const {
    const int64_t size = scores.num_scored[s] * call.num_heads * divide_up(call.kv_lens[s], CHUNK) * CHUNK;
    return std::min(size, KEPT_FLOATS);
  }

  bool takes(int64_t s) const { return size == 0 || size + size_of(s) <= KEPT_FLOATS; }

  void add(int64_t s) {
    const int64_t num_scored = scores.num_scored[s], kv_len = call.kv_lens[s], end = call.query_start_loc[s + 1];
    if (num_scored == 0) return;
    const bool keeps = size_of(s) < KEPT_FLOATS;
    size += size_of(s);
    for (int64_t head = 0; head < call.cache.num_kv_heads; ++head) {
      const int64_t max_rows = call.max_blocks * call.cache.block_size, first_tile = tiles.size();
      for (int64_t left = num_scored; left > 0; left -= tile_queries) {
        const int64_t num_queries = std::min(left, tile_queries), first_visible = kv_len - left + 1;
        const int64_t num_chunks = divide_up(first_visible + num_queries - 1, CHUNK);
        tiles.push_back({{call.block_tables + s * call.max_blocks, end - left, num_queries, first_visible, head, 1,
                          false, 0, num_chunks, nullptr, nullptr, false}, nullptr, nullptr, 1});
        kept_offsets.push_back(keeps ? kept_size : -1);
        if (keeps) kept_size += num_chunks * num_queries * group * CHUNK;
        work += num_queries * group * num_chunks * CHUNK * call.cache.head_dim;
      }
      units.push_back({first_tile, (int64_t)tiles.size(), kv_len,
                       scores.out + (s * call.cache.num_kv_heads + head) * max_rows});
    }
  }

  void run() {
    const int64_t padded_dim = divide_up(call.cache.head_dim, DIM_ALIGN) * DIM_ALIGN, tile_rows = tile_queries * group;
    // As in scores_isa.cpp; a row's span takes 4 floats, its state 2.
    const int64_t scratch_size = tile_rows * (QUERY_FLOATS * padded_dim + TILE + 6) + TILE * padded_dim;
    const int threads = work < SERIAL_WORK ? 1 : std::max(1, call.num_threads);
    static thread_local std::vector<float> kept_memory, scratch_memory;
    static thread_local std::vector<SoftmaxState> state_memory;
    float* kept = reserve(kept_memory, kept_size);
    float* scratch = reserve(scratch_memory, scratch_size * threads);

    // Few tiles are cut at chunk borders. That changes who computes a chunk, not what is computed.
    const bool cut = threads > 1 && (int64_t)tiles.size() < 4 * threads;
    int64_t num_states = 0;
    for (ScoredTile& each : tiles) {
      each.num_parts = cut ? each.tile.chunk_end : 1;
      num_states += each.num_parts * each.tile.num_queries * group;
    }
    SoftmaxState* states = reserve(state_memory, num_states);
    std::vector<MeasureJob> jobs;
    for (size_t i = 0; i < tiles.size(); ++i) {
      ScoredTile& each = tiles[i];
      each.kept = kept_offsets[i] < 0 ? nullptr : kept + kept_offsets[i];
      each.states = states;
      for (int64_t part = 0; part < each.num_parts; ++part) {
        jobs.push_back({each.tile, each.kept, states});
        if (cut) jobs.back().tile.chunk_begin = part, jobs.back().tile.chunk_end = part + 1;
        states += each.tile.num_queries * group;
      }
    }
    std::vector<std::pair<const Unit*, int64_t>> chunks;
    for (const Unit& unit : units)
      for (int64_t chunk = 0; chunk < divide_up(unit.kv_len, CHUNK); ++chunk) chunks.push_back({&unit, chunk});

    const int64_t num_jobs = jobs.size(), num_tiles = tiles.size(), num_chunks = chunks.size();
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      float* mine = scratch + omp_get_thread_num() * scratch_size;
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < num_jobs; ++i)
        kernels.measure[call.cache.dtype](call, jobs[i].tile, jobs[i].kept, jobs[i].states, mine);
#pragma omp for schedule(static)
      for (int64_t i = 0; i < num_tiles; ++i) settle(tiles[i]);
#pragma omp for schedule(dynamic, 1)
      for (int64_t i = 0; i < num_chunks; ++i) give(*chunks[i].first, chunks[i].second, mine);
    }
  }

 private:
  void settle(const ScoredTile& each) const {
    const int64_t rows = each.tile.num_queries * group;
    for (int64_t part = 1; part < each.num_parts; ++part)
      kernels.fold(each.states + part * rows, rows, each.states);
  }

  void give(const Unit& unit, int64_t chunk, float* scratch) const {
    float received[CHUNK] = {};
    for (int64_t i = unit.first_tile; i < unit.end_tile; ++i) {
      AttentionTile tile = tiles[i].tile;
      if (tile.chunk_end <= chunk) continue;
      tile.chunk_begin = chunk, tile.chunk_end = chunk + 1;
      kernels.give[call.cache.dtype](call, tile, tiles[i].kept, tiles[i].states, received, scratch);
    }
    const int64_t begin = chunk * CHUNK;
    memcpy(unit.out + begin, received, std::min(CHUNK, unit.kv_len - begin) * sizeof(float));
  }

  const KvartoAttention& call;
  const KvartoScores& scores;
  const ScoreKernels& kernels;
  const int64_t group, tile_queries;
  std::vector<ScoredTile> tiles;
  std::vector<int64_t> kept_offsets;  // -1: not kept
  std::vector<Unit> units;
  int64_t size = 0, kept_size = 0, work = 0;
};

void run(const KvartoScores& scores, const ScoreKernels& kernels) {
  for (int64_t s = 0; s < scores.attention.num_seqs;) {
    Wave wave(scores, kernels);
    do wave.add(s++);
    while (s < scores.attention.num_seqs && wave.takes(s));
    wave.run();
  }
}

}  // namespace
}  // namespace kvarto

extern "C" int32_t kvarto_attention_scores(const KvartoScores* scores, int64_t* detail) try {
  const int32_t status = kvarto::check(*scores, detail);
  if (status != KVARTO_OK) return status;
  kvarto::run(*scores, *kvarto::find_isa(scores->attention.isa)->scores);
  return KVARTO_OK;
} catch (const std::bad_alloc&) {
  return KVARTO_NO_MEMORY;
}
