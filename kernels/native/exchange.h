// Collectives of ranks on one host, through memory that all of them have mapped.
#pragma once

#include "abi.h"

extern "C" {

// One rank's end. The ranks make the same calls in the same order; a rank makes its calls one at a time.
struct KvartoExchange;

struct KvartoExchangeConfig {
  void* region;             // of kvarto_exchange_bytes, zeros at first, aligned to 64; outlives the exchange
  const int32_t* peer_fds;  // [world_size], read by kvarto_open_exchange: readable once that rank has died; -1: unknown
  int64_t slot_bytes;       // longer messages go in pieces; a multiple of 64
  int64_t timeout_ns;       // of one call
  int64_t spin_ns;          // how long a call waits for a rank before it sleeps
  int32_t rank, world_size;
};

int64_t kvarto_exchange_bytes(int32_t world_size, int64_t slot_bytes);
KvartoExchange* kvarto_open_exchange(const KvartoExchangeConfig* config);  // null: no memory
void kvarto_close_exchange(KvartoExchange* exchange);                      // frees; no call may be under way
// Calls of all ranks fail from now on, those that wait too, unless all ranks have already given their part of it. May
// be called while another thread is in a call.
void kvarto_abort_exchange(KvartoExchange* exchange);

// Sums over the ranks, in place: in float32, in rank order, rounded once. An element's bits depend on nothing but the
// elements at its place.
struct KvartoAllReduce {
  KvartoExchange* exchange;
  void* data;  // [num_tokens, dim], contiguous
  int64_t num_tokens, dim;
  int32_t dtype, isa, num_threads;
};

struct KvartoAllGather {
  KvartoExchange* exchange;
  const void* data;  // [num_bytes]
  void* out;         // [world_size, num_bytes]
  int64_t num_bytes;
};

struct KvartoBroadcast {
  KvartoExchange* exchange;
  void* data;  // [num_bytes]
  int64_t num_bytes;
  int32_t source;
};

int32_t kvarto_all_reduce(const KvartoAllReduce* call, int64_t* detail);
int32_t kvarto_all_gather(const KvartoAllGather* call, int64_t* detail);
int32_t kvarto_broadcast(const KvartoBroadcast* call, int64_t* detail);
}

namespace kvarto {

constexpr int32_t MAX_RANKS = 64;

struct ExchangeKernels {
  // out[i] = sum over the parts of part[i] for i in [begin, end); out may be one of the parts.
  void (*sum[KVARTO_NUM_FLOATS])(const void* const* parts, int64_t num_parts, int64_t begin, int64_t end, void* out);
};

}  // namespace kvarto
