// Threads that stay awake for a step. libgomp's go to sleep when they have waited a little, and waking one costs 10 to
// 100 microseconds in a virtual machine: a step's hundreds of ops would pay it again and again.
#include "team.h"

#include <omp.h>
#include <sched.h>

namespace kvarto {
namespace {

constexpr int SPINS = 128;  // some microseconds; then the core is offered to others at every turn

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

template <class Done>
void wait_until(const Done& done) {
  for (int turn = 0; !done(); ++turn) turn < SPINS ? pause() : (void)sched_yield();
}

struct Work {
  void (*run)(const void*, int);
  const void* body;
  int num_threads;
};

struct Team {
  int size;
  Work work;  // written by the first thread while the others wait
  alignas(64) std::atomic<int64_t> posted{0};
  alignas(64) std::atomic<int> busy{0};

  void post(const Work& next, int num_workers) {
    work = next;
    busy.store(num_workers, std::memory_order_relaxed);
    posted.fetch_add(1, std::memory_order_release);
  }

  // What the other threads do until they are given a null run.
  void serve(int thread) {
    for (int64_t seen = 0;; ++seen) {
      wait_until([&] { return posted.load(std::memory_order_acquire) > seen; });
      const Work mine = work;
      if (!mine.run) return;
      if (thread < mine.num_threads) mine.run(mine.body, thread);
      busy.fetch_sub(1, std::memory_order_release);
    }
  }

  void run(const Work& next) {
    post(next, size - 1);
    next.run(next.body, 0);
    // Fewer threads than were asked for: nobody's part is left out.
    for (int thread = size; thread < next.num_threads; ++thread) next.run(next.body, thread);
    wait_until([&] { return busy.load(std::memory_order_acquire) == 0; });
  }
};

thread_local Team* current = nullptr;

}  // namespace

void run_parallel(int num_threads, void (*run)(const void*, int), const void* body) {
  if (num_threads <= 1) {
    run(body, 0);
  } else if (current) {
    current->run({run, body, num_threads});
  } else {
#pragma omp parallel num_threads(num_threads)
    for (int thread = omp_get_thread_num(); thread < num_threads; thread += omp_get_num_threads()) run(body, thread);
  }
}

void run_with_team(int num_threads, void (*run)(const void*), const void* body) {
  if (num_threads <= 1 || current) {
    run(body);
    return;
  }
  Team team;
#pragma omp parallel num_threads(num_threads)
  if (omp_get_thread_num() == 0) {
    team.size = omp_get_num_threads();
    current = &team;
    run(body);
    current = nullptr;
    team.post({nullptr, nullptr, 0}, 0);
  } else {
    team.serve(omp_get_thread_num());
  }
}

}  // namespace kvarto
