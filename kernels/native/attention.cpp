// Cuts a ragged batch into tiles of about equal work and shares them out among threads.
#include <algorithm>
#include <new>
#include <vector>

#include "isa.h"
#include "team.h"

namespace kvarto {
namespace {

constexpr int64_t TARGET_ROWS = 96;  // query rows of a tile: they share each load of K and V

// As SERIAL_WORK, of work that waits for memory: its rows are not in a cache.
constexpr int64_t SERIAL_ATTENTION = 1 << 16;

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
void cut(const KvartoAttention& call, int64_t tile_queries, std::vector<AttentionTile>& tiles) {
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
      tiles.push_back({call.block_tables + s * call.max_blocks, first, num_queries, first_visible, 0, num_heads,
                       sinks > 0, behind / CHUNK, chunks_end, nullptr,
                       own ? call.residual_tables + s * call.max_blocks : nullptr, own, nullptr, 0,
                       num_queries * (last_visible - behind + sinks) * num_heads});
    }
  }
}

// Parts of the tile with fewer KV heads, as many each as let its query rows stay near and its pieces below the share:
// what neighbouring heads have in a block is then read in one go.
void part_heads(const AttentionTile& tile, const KvartoAttention& call, int64_t share,
                std::vector<AttentionTile>& parts) {
  const int64_t num_heads = tile.num_kv_heads;
  const int64_t near = num_heads * TARGET_ROWS / num_rows(call, tile);
  const int64_t small = num_heads * share * num_pieces(tile) / std::max<int64_t>(1, tile.work);
  const int64_t num_parts = divide_up(num_heads, std::max<int64_t>(1, std::min(near, small)));
  for (int64_t part = 0; part < num_parts; ++part) {
    parts.push_back(tile);
    AttentionTile& made = parts.back();
    made.kv_head = num_heads * part / num_parts;
    made.num_kv_heads = num_heads * (part + 1) / num_parts - made.kv_head;
    made.work = tile.work / num_heads * made.num_kv_heads;
  }
}

// The pieces of a tile that is whole, and where their records go.
void split(AttentionTile& whole, int64_t piece_records, float* partial, std::vector<AttentionTile>& pieces) {
  const int64_t count = num_pieces(whole);
  whole.partial = partial;
  whole.num_left = count;
  for (int64_t i = 0; i < count; ++i) {
    pieces.push_back(whole);
    AttentionTile& piece = pieces.back();
    piece.sinks = whole.sinks && i == 0;
    piece.own = whole.own && i == count - 1;
    piece.chunk_begin = whole.chunk_begin + (piece.sinks ? 0 : i - whole.sinks);
    piece.chunk_end = piece.chunk_begin + !(piece.sinks || piece.own);
    piece.partial = partial + i * piece_records;
    piece.whole = &whole;
    piece.work = whole.work / count;
  }
}

// What a thread keeps from call to call.
struct Memory {
  std::vector<AttentionTile> uncut, tiles, queue;
  std::vector<float> partial, scratch;
};

void run(const KvartoAttention& call, const AttentionKernels& kernels) {
  const int64_t group = call.num_heads / call.cache.num_kv_heads;
  const int64_t padded_dim = divide_up(call.cache.head_dim, DIM_ALIGN) * DIM_ALIGN, record = RECORD_HEAD + padded_dim;
  const int64_t tile_queries = std::max<int64_t>(1, TARGET_ROWS / group);

  static thread_local Memory memory;
  auto& [uncut, tiles, queue, partial_memory, scratch_memory] = memory;
  uncut.clear(), tiles.clear(), queue.clear();
  int64_t total = 0, partial_size = 0, max_rows = 0;
  cut(call, tile_queries, uncut);
  for (const AttentionTile& tile : uncut) total += tile.work;
  const int64_t budget = total * group * padded_dim < SERIAL_ATTENTION ? 1 : call.num_threads;
  // A tile that is too large a share of the work is cut at chunk borders. That changes who computes
  // a chunk, not what is computed.
  const int64_t share = budget > 1 ? total / (4 * budget) : total;
  for (const AttentionTile& tile : uncut) part_heads(tile, call, share, tiles);
  auto is_split = [&](const AttentionTile& tile) {
    return budget > 1 && num_pieces(tile) > 1 && tile.work > share;
  };
  for (const AttentionTile& tile : tiles) {
    max_rows = std::max(max_rows, num_rows(call, tile));
    if (is_split(tile)) partial_size += num_pieces(tile) * num_rows(call, tile) * record;
  }

  float* partial = reserve(partial_memory, partial_size);
  for (AttentionTile& tile : tiles) {
    if (!is_split(tile)) {
      queue.push_back(tile);
      continue;
    }
    const int64_t piece_records = num_rows(call, tile) * record;
    split(tile, piece_records, partial, queue);
    partial += num_pieces(tile) * piece_records;
  }
  std::stable_sort(queue.begin(), queue.end(), [](const AttentionTile& a, const AttentionTile& b) {
    return a.work > b.work;
  });

  // As in attention_rows.h; a row's span takes 4 floats.
  const int64_t scratch_size = max_rows * (QUERY_FLOATS * padded_dim + 2 * record + TILE + LINE) + TILE * padded_dim;
  AttentionQueue shared = {queue.data(), (int64_t)queue.size(), 0};
  const int threads = (int)std::max<int64_t>(1, std::min(budget, shared.num_tiles));
  float* scratch = reserve(scratch_memory, scratch_size * threads);
  parallel(threads, [&](int thread) {
    kernels.attend[call.cache.dtype](call, shared, scratch + thread * scratch_size);
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
