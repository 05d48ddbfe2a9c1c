// Cuts a ragged batch into tiles of about equal work and shares them out among threads.
#include <algorithm>
#include <new>
#include <vector>

#include "isa.h"
#include "team.h"

namespace kvarto {
namespace {

constexpr int64_t TARGET_ROWS = 48;  // query rows of a tile: they share each load of K and V

struct Job {
  AttentionTile tile;
  int64_t work;
};

// What a tile has records of: the sinks behind the window, if any, then its chunks, then what is from the residual.
int64_t num_pieces(const AttentionTile& tile) { return tile.sinks + tile.chunk_end - tile.chunk_begin + tile.own; }

constexpr int64_t LINE = 16;  // floats of a cache line

// From the start of a cache line. Grows, never shrinks, so that a step does not pay for fresh pages.
float* reserve(std::vector<float>& memory, int64_t size) {
  if ((int64_t)memory.size() < size + LINE) memory.resize(size + LINE);
  return (float*)(divide_up((int64_t)memory.data(), LINE * sizeof(float)) * LINE * sizeof(float));
}

struct Range {
  int64_t begin, end;
};

bool names_blocks(const int32_t* table, Range entries, const KvartoCache& cache) {
  for (int64_t b = entries.begin; b < entries.end; ++b)
    if (table[b] < 0 || table[b] >= cache.num_blocks) return false;
  return true;
}

// Of the query that stands at row visible - 1: rows behind its window, and where its own block begins.
int64_t rows_behind(const KvartoAttention& call, int64_t visible) {
  return std::max<int64_t>(0, visible - call.window);
}
int64_t own_begin(const KvartoAttention& call, int64_t visible) { return (visible - 1) & -call.cache.block_size; }

// Whether the table names all blocks that queries from first_visible to last_visible see in an int4 cache.
bool names_int4_blocks(const KvartoAttention& call, const int32_t* table, int64_t first_visible, int64_t last_visible) {
  const int64_t block_size = call.cache.block_size, end = own_begin(call, last_visible);
  const int64_t sinks = std::min(std::min(call.num_sinks, rows_behind(call, last_visible)), end);
  if (!names_blocks(table, {0, divide_up(sinks, block_size)}, call.cache)) return false;
  // The first query with a window that reaches out of its own block sees farthest back: if not the first of all, the
  // first of the next block, if any does.
  if (rows_behind(call, first_visible) >= own_begin(call, first_visible))
    first_visible = own_begin(call, first_visible) + block_size + 1;
  const int64_t behind = rows_behind(call, first_visible);
  return first_visible > last_visible || behind >= own_begin(call, first_visible) ||
         names_blocks(table, {behind / block_size, end / block_size}, call.cache);
}

int32_t check(const KvartoAttention& call, int64_t* detail) {
  const int32_t* start = call.query_start_loc;
  for (int64_t s = 0; s < call.num_seqs; ++s) {
    *detail = s;
    const int64_t num_queries = (int64_t)start[s + 1] - start[s];
    if (num_queries < 0 || (s == 0 && start[0] != 0)) return KVARTO_BAD_QUERY_START_LOC;
    const int64_t num_blocks = divide_up(call.kv_lens[s], call.cache.block_size);
    if (call.kv_lens[s] < num_queries || num_blocks > call.max_blocks) return KVARTO_BAD_KV_LEN;
    if (num_queries == 0) continue;
    const int64_t first_visible = call.kv_lens[s] - num_queries + 1;
    const int32_t* table = call.block_tables + s * call.max_blocks;
    if (call.residual_tables) {
      if (!names_int4_blocks(call, table, first_visible, call.kv_lens[s])) return KVARTO_BAD_BLOCK_ID;
      const Range own = {own_begin(call, first_visible) / call.cache.block_size, num_blocks};
      if (!names_blocks(call.residual_tables + s * call.max_blocks, own, call.residual))
        return KVARTO_BAD_RESIDUAL_BLOCK;
      continue;
    }
    // The first query sees farthest back; what lies between the sinks and its window is not looked at.
    const int64_t behind = rows_behind(call, first_visible);
    const int64_t sink_blocks = divide_up(std::min(call.num_sinks, behind), call.cache.block_size);
    if (!names_blocks(table, {0, sink_blocks}, call.cache) ||
        !names_blocks(table, {behind / call.cache.block_size, num_blocks}, call.cache))
      return KVARTO_BAD_BLOCK_ID;
  }
  *detail = call.num_seqs - 1;
  return start[call.num_seqs] == call.num_tokens ? KVARTO_OK : KVARTO_BAD_QUERY_START_LOC;
}

int64_t num_rows(const KvartoAttention& call, const AttentionTile& tile) {
  return tile.num_queries * tile.num_kv_heads * (call.num_heads / call.cache.num_kv_heads);
}

// Consecutive queries of each sequence with all KV heads.
std::vector<Job> cut(const KvartoAttention& call, int64_t tile_queries) {
  std::vector<Job> jobs;
  for (int64_t s = 0; s < call.num_seqs; ++s) {
    const int64_t begin = call.query_start_loc[s], end = call.query_start_loc[s + 1];
    for (int64_t first = begin; first < end; first += tile_queries) {
      const int64_t num_queries = std::min(tile_queries, end - first);
      const int64_t first_visible = call.kv_lens[s] - (end - first) + 1;
      const int64_t last_visible = first_visible + num_queries - 1;
      const int64_t behind = std::max<int64_t>(0, first_visible - call.window);
      const int64_t sinks = std::min(call.num_sinks, std::max<int64_t>(0, last_visible - call.window));
      const int64_t num_heads = call.cache.num_kv_heads;
      const bool own = call.residual_tables != nullptr;
      const int64_t chunks_end = divide_up(own ? own_begin(call, last_visible) : last_visible, CHUNK);
      jobs.push_back({{call.block_tables + s * call.max_blocks, first, num_queries, first_visible, 0, num_heads,
                       sinks > 0, behind / CHUNK, chunks_end, nullptr,
                       own ? call.residual_tables + s * call.max_blocks : nullptr, own},
                      num_queries * (last_visible - behind + sinks) * num_heads});
    }
  }
  return jobs;
}

// Parts of the job with fewer KV heads, as many each as let its query rows stay near and its pieces below the share:
// what neighbouring heads have in a block is then read in one go.
void part_heads(const Job& job, const KvartoAttention& call, int64_t share, std::vector<Job>& parts) {
  const int64_t num_heads = job.tile.num_kv_heads;
  const int64_t near = num_heads * TARGET_ROWS / num_rows(call, job.tile);
  const int64_t small = num_heads * share * num_pieces(job.tile) / std::max<int64_t>(1, job.work);
  const int64_t num_parts = divide_up(num_heads, std::max<int64_t>(1, std::min(near, small)));
  for (int64_t part = 0; part < num_parts; ++part) {
    parts.push_back(job);
    AttentionTile& tile = parts.back().tile;
    tile.kv_head = num_heads * part / num_parts;
    tile.num_kv_heads = num_heads * (part + 1) / num_parts - tile.kv_head;
    parts.back().work = job.work / num_heads * tile.num_kv_heads;
  }
}

void run(const KvartoAttention& call, const AttentionKernels& kernels) {
  const int64_t group = call.num_heads / call.cache.num_kv_heads;
  const int64_t padded_dim = divide_up(call.cache.head_dim, DIM_ALIGN) * DIM_ALIGN, record = RECORD_HEAD + padded_dim;
  const int64_t tile_queries = std::max<int64_t>(1, TARGET_ROWS / group);

  std::vector<Job> tiles, jobs, split;
  int64_t total = 0, partial_size = 0, max_rows = 0;
  const std::vector<Job> uncut = cut(call, tile_queries);
  for (const Job& job : uncut) total += job.work;
  const int64_t budget = total * group * padded_dim < SERIAL_WORK ? 1 : call.num_threads;
  // A tile that is too large a share of the work is cut at chunk borders. That changes who computes
  // a chunk, not what is computed.
  const int64_t share = budget > 1 ? total / (4 * budget) : total;
  for (const Job& job : uncut) part_heads(job, call, share, tiles);
  auto is_split = [&](const Job& job) {
    return budget > 1 && num_pieces(job.tile) > 1 && job.work > share;
  };
  for (const Job& job : tiles) {
    max_rows = std::max(max_rows, num_rows(call, job.tile));
    if (is_split(job)) partial_size += num_pieces(job.tile) * num_rows(call, job.tile) * record;
  }

  static thread_local std::vector<float> partial_memory, scratch_memory;
  float* partial = reserve(partial_memory, partial_size);
  for (const Job& job : tiles) {
    if (!is_split(job)) {
      jobs.push_back(job);
      continue;
    }
    split.push_back(job);
    split.back().tile.partial = partial;
    for (int64_t piece = 0; piece < num_pieces(job.tile); ++piece) {
      jobs.push_back({job.tile, job.work / num_pieces(job.tile)});
      AttentionTile& tile = jobs.back().tile;
      tile.sinks = job.tile.sinks && piece == 0;
      tile.own = job.tile.own && piece == num_pieces(job.tile) - 1;
      tile.chunk_begin = job.tile.chunk_begin + (tile.sinks ? 0 : piece - job.tile.sinks);
      tile.chunk_end = tile.chunk_begin + !(tile.sinks || tile.own);
      tile.partial = partial;
      partial += num_rows(call, tile) * record;
    }
  }
  std::stable_sort(jobs.begin(), jobs.end(), [](const Job& a, const Job& b) { return a.work > b.work; });

  // As in attention_rows.h; a row's span takes 4 floats.
  const int64_t scratch_size = max_rows * (padded_dim + 2 * record + TILE + LINE) + TILE * padded_dim;
  const int64_t num_jobs = jobs.size(), num_split = split.size();
  const int threads = (int)std::max<int64_t>(1, std::min(budget, num_jobs));
  float* scratch = reserve(scratch_memory, scratch_size * threads);
  parallel_jobs(threads, num_jobs, [&](int thread, int64_t i) {
    kernels.attend[call.cache.dtype](call, jobs[i].tile, scratch + thread * scratch_size);
  });
  parallel_jobs(threads, num_split, [&](int thread, int64_t i) {
    kernels.combine(call, split[i].tile, scratch + thread * scratch_size);
  });
}

}  // namespace
}  // namespace kvarto

extern "C" int32_t kvarto_paged_attention(const KvartoAttention* call, int64_t* detail) try {
  const int32_t status = kvarto::check(*call, detail);
  if (status != KVARTO_OK) return status;
  kvarto::run(*call, *kvarto::find_isa(call->isa)->attention);
  return KVARTO_OK;
} catch (const std::bad_alloc&) {
  return KVARTO_NO_MEMORY;
}
