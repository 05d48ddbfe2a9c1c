// Calls of the other ops, recorded once with the most tokens there can be and run again for those of a step.
#pragma once

#include "abi.h"

extern "C" {

enum KvartoOpKind : int32_t {
  KVARTO_OP_NORM = 0,
  KVARTO_OP_ROTATION = 1,
  KVARTO_OP_GATE = 2,
  KVARTO_OP_LINEAR = 3,
  KVARTO_OP_CACHE_WRITE = 4,
  KVARTO_OP_QUANTIZATION = 5,
  KVARTO_OP_ATTENTION = 6,
  KVARTO_OP_ALL_REDUCE = 7,
  KVARTO_OP_TAKE = 8,
  KVARTO_OP_BEST = 9,
  KVARTO_NUM_OPS = 10,
};

struct KvartoOp {
  const void* call;  // the struct of that kind
  int32_t kind;
  int32_t source;      // which of the groups or, of a take, of the indices of a step it reads, where it reads any
  int32_t of_sampled;  // it has a row for each sampled row, not for each token
};

enum { KVARTO_TOKEN_IDS = 0, KVARTO_POSITIONS, KVARTO_SAMPLED_ROWS, KVARTO_NUM_INDICES };

struct KvartoStepGroup {
  const int32_t* block_tables;    // [num_seqs, max_blocks]
  const int64_t* slot_mapping;    // [num_tokens]
  const int64_t* filled_blocks;   // [num_filled]; null: there is no residual
  int64_t max_blocks;
};

// What differs from step to step; the last group is the residual, where there is one.
struct KvartoStep {
  const KvartoStepGroup* groups;
  const int32_t* query_start_loc;  // [num_seqs + 1]
  const int32_t* kv_lens;          // [num_seqs]
  const int64_t* indices[KVARTO_NUM_INDICES];  // [num_tokens], [num_tokens], [num_sampled]
  int64_t num_groups, num_tokens, num_sampled, num_seqs, num_filled;
  int32_t num_threads;
  int64_t* nanoseconds;  // [KVARTO_NUM_OPS], what ops of each kind take is added; null: nobody asks
};

// Stops at the first op that does not return KVARTO_OK, and returns what it returned.
int32_t kvarto_replay(const KvartoOp* ops, int64_t num_ops, const KvartoStep* step, int64_t* detail);
}
