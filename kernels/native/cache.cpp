// Writes a step's K and V into their slots.
#include <cstring>

#include "isa.h"
#include "quantize.h"
#include "team.h"

namespace {

// What to do with one head of one row.
struct RowWriter {
  const KvartoCache& cache;
  int32_t dtype;  // of rows
  void (*to_float)(const void*, int64_t, float*);

  // `head`: of one block in the cache.
  void operator()(const char* row, char* head, int64_t offset) const {
    const int64_t size = kvarto::element_size(cache.dtype) * cache.head_dim;
    if (!kvarto::is_quantized(cache.dtype)) {
      memcpy(head + offset * size, row, size);
      return;
    }
    float wide[kvarto::MAX_HEAD_DIM];
    to_float(row, cache.head_dim, wide);
    const float scale = kvarto::quantize_row(wide, cache.head_dim, cache.dtype, head + offset * size);
    memcpy(head + cache.block_size * size + offset * sizeof scale, &scale, sizeof scale);
  }
};

}  // namespace

extern "C" int32_t kvarto_write_kv(const KvartoCacheWrite* call, int64_t* detail) {
  const KvartoCache* cache = &call->cache;
  const int64_t* slot_mapping = call->slot_mapping;
  const int64_t num_tokens = call->num_tokens;
  const int32_t dtype = call->dtype, num_threads = call->num_threads;
  const int64_t size = kvarto::element_size(dtype), row = cache->head_dim * size;
  const int64_t head = kvarto::head_bytes(*cache), side = cache->num_kv_heads * head;
  const int64_t block = cache->num_layers * 2 * side, num_slots = cache->num_blocks * cache->block_size;
  for (int64_t t = 0; t < num_tokens; ++t)
    if (slot_mapping[t] < 0 || slot_mapping[t] >= num_slots) {
      *detail = t;
      return KVARTO_BAD_SLOT;
    }
  const RowWriter write{*cache, dtype, kvarto::find_isa(call->isa)->linear->to_float[dtype]};
  char* data = (char*)cache->data + call->layer * 2 * side;
  const bool parallel = num_threads > 1 && num_tokens * cache->num_kv_heads * row > 256 * 1024;
  kvarto::parallel_ranges(parallel ? num_threads : 1, num_tokens, [&](int, int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      char* out = data + slot_mapping[t] / cache->block_size * block;
      const int64_t offset = slot_mapping[t] % cache->block_size;
      const char* key_in = (const char*)call->key + t * call->key_stride * size;
      const char* value_in = (const char*)call->value + t * call->value_stride * size;
      for (int64_t h = 0; h < cache->num_kv_heads; ++h, out += head, key_in += row, value_in += row) {
        write(key_in, out, offset);
        write(value_in, out + side, offset);
      }
    }
  });
  return KVARTO_OK;
}
