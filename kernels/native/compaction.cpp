// Moves the rows that each KV head keeps into fresh blocks.
#include <algorithm>
#include <cstring>

#include "isa.h"

namespace kvarto {
namespace {

constexpr int64_t SERIAL_BYTES = 256 * 1024;  // below which waking threads costs more than it saves

struct Compaction {
  const KvartoCompaction& call;
  const int64_t block_size, head, row, side, block;  // bytes, but for block_size

  explicit Compaction(const KvartoCompaction& call)
      : call(call),
        block_size(call.cache.block_size),
        head(head_bytes(call.cache)),
        row(call.cache.head_dim * element_size(call.cache.dtype)),
        side(call.cache.num_kv_heads * head),
        block(call.cache.num_layers * 2 * side) {}

  const int32_t* rows_of(int64_t s, int64_t h) const {
    return call.rows + (s * call.cache.num_kv_heads + h) * call.max_kept;
  }

  bool has_block(int32_t block_id) const { return block_id >= 0 && block_id < call.cache.num_blocks; }

  int32_t check(int64_t s) const {
    const int64_t num_kept = call.num_kept[s];
    if (num_kept < 0 || num_kept > std::min(call.max_kept, call.max_target_blocks * block_size))
      return KVARTO_BAD_NUM_KEPT;
    for (int64_t b = 0; b * block_size < num_kept; ++b)
      if (!has_block(call.target_tables[s * call.max_target_blocks + b])) return KVARTO_BAD_TARGET_BLOCK;
    for (int64_t h = 0; h < call.cache.num_kv_heads; ++h)
      for (int64_t i = 0; i < num_kept; ++i) {
        const int32_t from = rows_of(s, h)[i];
        if (from < 0 || from >= call.max_source_blocks * block_size) return KVARTO_BAD_KEPT_ROW;
        if (!has_block(call.source_tables[s * call.max_source_blocks + from / block_size]))
          return KVARTO_BAD_SOURCE_BLOCK;
      }
    return KVARTO_OK;
  }

  // All rows of a KV head of a sequence, K and V.
  void run(int64_t s, int64_t h) const {
    const int32_t *rows = rows_of(s, h), *sources = call.source_tables + s * call.max_source_blocks;
    const int32_t* targets = call.target_tables + s * call.max_target_blocks;
    char* data = (char*)call.cache.data + call.layer * 2 * side + h * head;
    for (int64_t i = 0; i < call.num_kept[s]; ++i) {
      const char* from = data + sources[rows[i] / block_size] * block;
      char* to = data + targets[i / block_size] * block;
      copy(from, rows[i] % block_size, to, i % block_size);
      copy(from + side, rows[i] % block_size, to + side, i % block_size);
    }
  }

 private:
  // `from`, `to`: one head of one block.
  void copy(const char* from, int64_t from_offset, char* to, int64_t to_offset) const {
    memcpy(to + to_offset * row, from + from_offset * row, row);
    if (!is_quantized(call.cache.dtype)) return;
    const int64_t codes = block_size * row, scale = sizeof(float);
    memcpy(to + codes + to_offset * scale, from + codes + from_offset * scale, scale);
  }
};

}  // namespace
}  // namespace kvarto

extern "C" int32_t kvarto_compact_rows(const KvartoCompaction* call, int64_t* detail) {
  const kvarto::Compaction compaction(*call);
  int64_t bytes = 0;
  for (int64_t s = 0; s < call->num_seqs; ++s) {
    *detail = s;
    const int32_t status = compaction.check(s);
    if (status != KVARTO_OK) return status;
    bytes += call->num_kept[s] * call->cache.num_kv_heads * 2 * compaction.row;
  }
  const int64_t num_jobs = call->num_seqs * call->cache.num_kv_heads;
  const bool parallel = call->num_threads > 1 && bytes > kvarto::SERIAL_BYTES;
#pragma omp parallel for schedule(dynamic, 1) num_threads(call->num_threads) if (parallel)
  for (int64_t job = 0; job < num_jobs; ++job)
    compaction.run(job / call->cache.num_kv_heads, job % call->cache.num_kv_heads);
  return KVARTO_OK;
}
