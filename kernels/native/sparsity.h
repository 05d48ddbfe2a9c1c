// KV sparsity: what crosses the C ABI, and what scores.cpp asks of scores_isa.cpp.
#pragma once

#include "abi.h"

struct KvartoScores {
  KvartoAttention attention;  // its masks, far sinks and out are not looked at
  const int32_t* num_scored;  // [num_seqs]: how many of a sequence's last queries are scored
  float* out;  // [num_seqs, num_kv_heads, max_blocks * block_size]; only at rows that some scored query sees
};

struct KvartoCompaction {
  KvartoCache cache;
  const int32_t* rows;           // [num_seqs, num_kv_heads, max_kept]
  const int32_t* source_tables;  // [num_seqs, max_source_blocks]
  const int32_t* target_tables;  // [num_seqs, max_target_blocks]
  const int32_t* num_kept;       // [num_seqs]
  int64_t num_seqs, max_kept, max_source_blocks, max_target_blocks, layer;
  int32_t num_threads;
};

namespace kvarto {

// Of one query row over some KV rows: the largest score, in base 2, and the sum of 2^(score - largest).
struct SoftmaxState {
  float largest, sum;
};

// Both take an AttentionTile of scored queries with its KV head and chunks, by the dtype of the cache. `kept` holds the
// tile's scores, [chunks, rows, CHUNK] from chunk 0 on; null: they are computed again.
struct ScoreKernels {
  // The states of the tile's rows over its chunks, and their scores.
  void (*measure[KVARTO_NUM_DTYPES])(const KvartoAttention&, const AttentionTile&, float* kept, SoftmaxState* states,
                                     float* scratch);
  // Adds what the rows of the tile's one chunk receive, given the states over all chunks, to received [CHUNK].
  void (*give[KVARTO_NUM_DTYPES])(const KvartoAttention&, const AttentionTile&, const float* kept,
                                  const SoftmaxState* states, float* received, float* scratch);
  // Folds the states of some rows over later KV rows into those over all before.
  void (*fold)(const SoftmaxState* later, int64_t num_rows, SoftmaxState* states);
};

}  // namespace kvarto
