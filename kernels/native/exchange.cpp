// How ranks of one host wait for each other and read each other's parts.
//
// Every rank has two slots in the region, and a message goes in pieces that fit one. Piece n uses slot n % 2: each rank
// writes its own, publishes it, waits until all have published theirs, and reads. One wait per piece is enough: who
// writes piece n + 1 has seen every rank publish piece n, and a rank publishes piece n after it has read piece n - 1,
// whose slot piece n + 1 overwrites. (Publishing releases and waiting acquires, so those reads come before that write.)
#include "exchange.h"

#include <errno.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <climits>
#include <cstring>
#include <new>

#include "isa.h"
#include "team.h"

namespace kvarto {
namespace {

constexpr int64_t CACHE_LINE = 64;
constexpr int64_t NS_PER_S = 1000000000;
constexpr int64_t SLEEP_NS = 20000000;        // at most so long until a sleeper looks whether its peers live
constexpr int32_t PAUSES = 64;                // of a waiting rank between two looks at the clock
constexpr int64_t PARALLEL_BYTES = 1 << 16;   // below which waking threads costs more than it saves
constexpr uint32_t ABORTED = 1, PUBLISHED = 2;

// Zeros are a good start. Count and flag are one word, so that a sleeper on the count is woken by the flag too.
struct RankState {
  alignas(CACHE_LINE) std::atomic<uint32_t> progress;  // PUBLISHED times the pieces so far, modulo 2^32; ABORTED
  uint64_t tags[2];                                    // what the pieces in its slots belong to
  alignas(CACHE_LINE) std::atomic<uint32_t> num_sleepers;
};
static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(std::atomic<uint32_t>) == 4, "a futex");

enum Kind : uint64_t { ALL_REDUCE = 1, ALL_GATHER, BROADCAST };

// Equal on ranks that make the same call.
uint64_t tag_of(Kind kind, int32_t dtype_or_source, int64_t num_bytes) {
  return (uint64_t)num_bytes << 16 | (uint64_t)dtype_or_source << 4 | kind;
}

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * NS_PER_S + now.tv_nsec;
}

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Sleeps while the word is as expected, until woken or for timeout_ns.
void sleep_on(std::atomic<uint32_t>& word, uint32_t expected, int64_t timeout_ns) {
  const timespec timeout = {(time_t)(timeout_ns / NS_PER_S), (long)(timeout_ns % NS_PER_S)};
  syscall(SYS_futex, &word, FUTEX_WAIT, expected, &timeout, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

}  // namespace
}  // namespace kvarto

using namespace kvarto;

struct KvartoExchange {
  RankState* states;  // [world_size]
  char* slots;        // [2, world_size, slot_bytes]
  int64_t slot_bytes, timeout_ns, spin_ns;
  int32_t rank, world_size;
  pollfd peers[MAX_RANKS];

  char* slot(uint32_t piece, int32_t of_rank) const {
    return slots + ((piece / PUBLISHED % 2) * world_size + of_rank) * slot_bytes;
  }

  int32_t fail(KvartoStatus status, int32_t lost_rank, int64_t* detail) {
    *detail = lost_rank;
    abort();
    return status;
  }

  void abort() {
    for (int32_t r = 0; r < world_size; ++r) {
      states[r].progress.fetch_or(ABORTED);
      wake_all(states[r].progress);
    }
  }

  // What a wait may do by now; KVARTO_OK: go on waiting.
  int32_t look(int32_t waits_for, int64_t deadline_ns, int64_t* detail) {
    if (poll(peers, world_size, 0) > 0)
      for (int32_t r = 0; r < world_size; ++r)
        if (peers[r].revents) return fail(KVARTO_RANK_DIED, r, detail);
    return now_ns() >= deadline_ns ? fail(KVARTO_RANK_LATE, waits_for, detail) : (int32_t)KVARTO_OK;
  }

  // Until `peer` has published what makes its count `target`.
  int32_t wait(int32_t peer, uint32_t target, int64_t deadline_ns, int64_t* detail) {
    RankState& state = states[peer];
    const auto published = [&](uint32_t word) { return (int32_t)((word & ~ABORTED) - target) >= 0; };
    if (published(state.progress.load(std::memory_order_acquire))) return KVARTO_OK;
    for (const int64_t end_ns = now_ns() + spin_ns; now_ns() < end_ns;) {
      for (int32_t i = 0; i < PAUSES; ++i) {
        relax();
        if (published(state.progress.load(std::memory_order_acquire))) return KVARTO_OK;
      }
      // Another rank, or the Head, may have no core but this one.
      sched_yield();
    }
    // A peer publishes before it looks for sleepers, and a sleeper says so before it looks again: one sees the other.
    state.num_sleepers.fetch_add(1);
    int32_t status = KVARTO_OK;
    for (uint32_t word; status == KVARTO_OK && !published(word = state.progress.load());) {
      status = word & ABORTED ? (int32_t)KVARTO_EXCHANGE_ABORTED : look(peer, deadline_ns, detail);
      if (status == KVARTO_OK) sleep_on(state.progress, word, SLEEP_NS);
    }
    state.num_sleepers.fetch_sub(1);
    return status;
  }

  // write(slot, offset, bytes) puts a piece of this rank's message into its slot; read(piece, offset, bytes) takes it
  // from those of all ranks.
  template <class Write, class Read>
  int32_t run(uint64_t tag, int64_t num_bytes, int64_t* detail, const Write& write, const Read& read) {
    RankState& own = states[rank];
    const int64_t deadline_ns = now_ns() + timeout_ns;
    int64_t offset = 0;
    do {
      const uint32_t word = own.progress.load(std::memory_order_acquire);
      if (word & ABORTED) return KVARTO_EXCHANGE_ABORTED;
      const int64_t bytes = std::min(slot_bytes, num_bytes - offset);
      write(slot(word, rank), offset, bytes);
      own.tags[word / PUBLISHED % 2] = tag;
      own.progress.fetch_add(PUBLISHED);
      if (own.num_sleepers.load()) wake_all(own.progress);
      for (int32_t r = 0; r < world_size; ++r) {
        if (r == rank) continue;
        if (const int32_t status = wait(r, word + PUBLISHED, deadline_ns, detail)) return status;
        if (states[r].tags[word / PUBLISHED % 2] != tag) return fail(KVARTO_OTHER_COLLECTIVE, r, detail);
      }
      read(word, offset, bytes);
      offset += bytes;
    } while (offset < num_bytes);
    return KVARTO_OK;
  }
};

namespace {

// Calls work(begin, end) for parts of [0, count), which is so many bytes.
template <class Work>
void share(int64_t count, int64_t bytes, int32_t num_threads, const Work& work) {
  const int64_t lines = divide_up(bytes, CACHE_LINE);
  const int threads = bytes < PARALLEL_BYTES ? 1 : (int)std::min<int64_t>(num_threads, lines);
  if (threads <= 1) return work(0, count);
  const int64_t per_line = count * CACHE_LINE / bytes;
  parallel_ranges(threads, lines, [&](int, int64_t begin, int64_t end) {
    work(begin * per_line, std::min(count, end * per_line));
  });
}

}  // namespace

extern "C" {

int64_t kvarto_exchange_bytes(int32_t world_size, int64_t slot_bytes) {
  return world_size * ((int64_t)sizeof(RankState) + 2 * slot_bytes);
}

KvartoExchange* kvarto_open_exchange(const KvartoExchangeConfig* config) {
  auto* exchange = new (std::nothrow) KvartoExchange;
  if (!exchange) return nullptr;
  exchange->states = (RankState*)config->region;
  exchange->slots = (char*)(exchange->states + config->world_size);
  exchange->slot_bytes = config->slot_bytes;
  exchange->timeout_ns = config->timeout_ns;
  exchange->spin_ns = config->spin_ns;
  exchange->rank = config->rank;
  exchange->world_size = config->world_size;
  for (int32_t r = 0; r < config->world_size; ++r) exchange->peers[r] = {config->peer_fds[r], POLLIN, 0};
  return exchange;
}

void kvarto_close_exchange(KvartoExchange* exchange) { delete exchange; }

void kvarto_abort_exchange(KvartoExchange* exchange) { exchange->abort(); }

int32_t kvarto_all_reduce(const KvartoAllReduce* call, int64_t* detail) {
  KvartoExchange& exchange = *call->exchange;
  const auto sum = find_isa(call->isa)->exchange->sum[call->dtype];
  const int64_t size = element_size(call->dtype), num_bytes = call->num_tokens * call->dim * size;
  char* const data = (char*)call->data;
  return exchange.run(
      tag_of(ALL_REDUCE, call->dtype, num_bytes), num_bytes, detail,
      [&](char* slot, int64_t offset, int64_t bytes) {
        share(bytes, bytes, call->num_threads,
              [&](int64_t begin, int64_t end) { memcpy(slot + begin, data + offset + begin, end - begin); });
      },
      [&](uint32_t piece, int64_t offset, int64_t bytes) {
        const void* parts[MAX_RANKS];
        for (int32_t r = 0; r < exchange.world_size; ++r) parts[r] = exchange.slot(piece, r);
        share(bytes / size, bytes, call->num_threads, [&](int64_t begin, int64_t end) {
          sum(parts, exchange.world_size, begin, end, data + offset);
        });
      });
}

int32_t kvarto_all_gather(const KvartoAllGather* call, int64_t* detail) {
  KvartoExchange& exchange = *call->exchange;
  const char* const data = (const char*)call->data;
  char* const out = (char*)call->out;
  return exchange.run(
      tag_of(ALL_GATHER, 0, call->num_bytes), call->num_bytes, detail,
      [&](char* slot, int64_t offset, int64_t bytes) { memcpy(slot, data + offset, bytes); },
      [&](uint32_t piece, int64_t offset, int64_t bytes) {
        for (int32_t r = 0; r < exchange.world_size; ++r)
          memcpy(out + r * call->num_bytes + offset, exchange.slot(piece, r), bytes);
      });
}

int32_t kvarto_broadcast(const KvartoBroadcast* call, int64_t* detail) {
  KvartoExchange& exchange = *call->exchange;
  char* const data = (char*)call->data;
  return exchange.run(
      tag_of(BROADCAST, call->source, call->num_bytes), call->num_bytes, detail,
      [&](char* slot, int64_t offset, int64_t bytes) {
        if (exchange.rank == call->source) memcpy(slot, data + offset, bytes);
      },
      [&](uint32_t piece, int64_t offset, int64_t bytes) {
        if (exchange.rank != call->source) memcpy(data + offset, exchange.slot(piece, call->source), bytes);
      });
}
}
