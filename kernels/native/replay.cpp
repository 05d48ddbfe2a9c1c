// Replays recorded ops: what a step brings is put into a copy of each call.
#include "replay.h"

#include <chrono>

#include "exchange.h"
#include "rows.h"
#include "team.h"

namespace {

int64_t now() {
  const auto since = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

template <class Call>
Call recorded(const KvartoOp& op, const KvartoStep& step) {
  Call call = *(const Call*)op.call;
  call.num_threads = step.num_threads;
  return call;
}

int64_t num_rows(const KvartoOp& op, const KvartoStep& step) {
  return op.of_sampled ? step.num_sampled : step.num_tokens;
}

// Ops that differ from step to step in nothing but their number of rows.
template <class Call, int32_t (*function)(const Call*, int64_t*)>
int32_t for_rows(const KvartoOp& op, const KvartoStep& step, int64_t* detail) {
  auto call = recorded<Call>(op, step);
  call.num_tokens = num_rows(op, step);
  return function(&call, detail);
}

int32_t linear(const KvartoOp& op, const KvartoStep& step, int64_t* detail) {
  auto call = recorded<KvartoLinear>(op, step);
  call.m = num_rows(op, step);
  return kvarto_linear(&call, detail);
}

int32_t take(const KvartoOp& op, const KvartoStep& step, int64_t* detail) {
  auto call = recorded<KvartoTake>(op, step);
  call.num_tokens = num_rows(op, step);
  call.index = step.indices[op.source];
  return kvarto_take(&call, detail);
}

int32_t write_kv(const KvartoOp& op, const KvartoStep& step, int64_t* detail) {
  auto call = recorded<KvartoCacheWrite>(op, step);
  call.num_tokens = step.num_tokens;
  call.slot_mapping = step.groups[op.source].slot_mapping;
  return kvarto_write_kv(&call, detail);
}

int32_t quantize_blocks(const KvartoOp& op, const KvartoStep& step, int64_t* detail) {
  auto call = recorded<KvartoQuantization>(op, step);
  call.blocks = step.groups[op.source].filled_blocks;
  call.residual_blocks = step.groups[step.num_groups - 1].filled_blocks;
  call.num_blocks = step.num_filled;
  return kvarto_quantize_blocks(&call, detail);
}

int32_t attend(const KvartoOp& op, const KvartoStep& step, int64_t* detail) {
  auto call = recorded<KvartoAttention>(op, step);
  const KvartoStepGroup& group = step.groups[op.source];
  call.num_tokens = step.num_tokens;
  call.num_seqs = step.num_seqs;
  call.query_start_loc = step.query_start_loc;
  call.kv_lens = step.kv_lens;
  call.block_tables = group.block_tables;
  call.max_blocks = group.max_blocks;
  if (call.residual_tables) call.residual_tables = step.groups[step.num_groups - 1].block_tables;
  return kvarto_paged_attention(&call, detail);
}

constexpr int32_t (*RUN[KVARTO_NUM_OPS])(const KvartoOp&, const KvartoStep&, int64_t*) = {
    for_rows<KvartoNorm, kvarto_norm>,
    for_rows<KvartoRotation, kvarto_rotate>,
    for_rows<KvartoGate, kvarto_gate>,
    linear,
    write_kv,
    quantize_blocks,
    attend,
    for_rows<KvartoAllReduce, kvarto_all_reduce>,
    take,
    for_rows<KvartoBest, kvarto_best>,
};

int32_t run_all(const KvartoOp* ops, int64_t num_ops, const KvartoStep* step, int64_t* detail) {
  int64_t before = step->nanoseconds ? now() : 0;
  for (int64_t i = 0; i < num_ops; ++i) {
    if (!num_rows(ops[i], *step)) continue;
    if (const int32_t status = RUN[ops[i].kind](ops[i], *step, detail)) return status;
    if (step->nanoseconds) {
      const int64_t after = now();
      step->nanoseconds[ops[i].kind] += after - before;
      before = after;
    }
  }
  return KVARTO_OK;
}

}  // namespace

extern "C" int32_t kvarto_replay(const KvartoOp* ops, int64_t num_ops, const KvartoStep* step, int64_t* detail) {
  int32_t status = KVARTO_OK;
  kvarto::with_team(step->num_threads, [&] { status = run_all(ops, num_ops, step, detail); });
  return status;
}
