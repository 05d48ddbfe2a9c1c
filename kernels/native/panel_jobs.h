// How the panels of a weight times blocks of rows are shared out among threads.
#pragma once

#include <algorithm>
#include <vector>

#include "isa.h"
#include "team.h"

namespace kvarto {

// Jobs 0, 1, 2, ... in one range per thread: neighbours go to the same one, which reads the weight as a stream. Who is
// through with its own range takes jobs of the others.
class PanelJobs {
 public:
  explicit PanelJobs(const KvartoLinear& call)
      : num_rows_(call.m),
        num_blocks_(divide_up(call.m, ROW_BLOCK)),
        block_(divide_up(call.m, std::max<int64_t>(num_blocks_, 1))),
        num_jobs_(divide_up(call.n, PANEL) * num_blocks_) {
    const int64_t budget = call.m * call.n * call.k < SERIAL_WORK ? 1 : call.num_threads;
    num_threads_ = (int)std::max<int64_t>(1, std::min(budget, num_jobs_));
  }

  int num_threads() const { return num_threads_; }
  // Most rows of a job.
  int64_t block() const { return block_; }

  // Calls multiply(thread, panel, m_begin, m_end) for every panel and block of rows.
  template <class Multiply>
  void run(const Multiply& multiply) const {
    static thread_local std::vector<int64_t> next;
    if ((int64_t)next.size() < num_threads_ * SPACING) next.resize(num_threads_ * SPACING);
    for (int64_t thread = 0; thread < num_threads_; ++thread) next[thread * SPACING] = begin(thread);
    int64_t* counters = next.data();
    parallel(num_threads_, [&](int thread) {
      for (int64_t turn = 0; turn < num_threads_; ++turn) {
        const int64_t owner = (thread + turn) % num_threads_, end = begin(owner + 1);
        for (int64_t job; (job = take(counters + owner * SPACING)) < end;) {
          const int64_t m = job % num_blocks_ * block_;
          multiply(thread, job / num_blocks_, m, std::min(m + block_, num_rows_));
        }
      }
    });
  }

 private:
  static constexpr int64_t ROW_BLOCK = 192;
  static constexpr int64_t SPACING = 8;  // a cache line per counter

  int64_t begin(int64_t thread) const { return thread * num_jobs_ / num_threads_; }
  static int64_t take(int64_t* counter) {
    int64_t job;
#pragma omp atomic capture
    job = (*counter)++;
    return job;
  }

  int64_t num_rows_, num_blocks_, block_, num_jobs_;
  int num_threads_;
};

}  // namespace kvarto
