// How ops share their work out among threads: OpenMP's, which are torch's.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace kvarto {

// Calls run(body, thread) for threads 0 .. num_threads - 1 at once and returns when all have returned.
void run_parallel(int num_threads, void (*run)(const void* body, int thread), const void* body);

// Runs body with a team of threads that stays awake until it returns: what body shares out costs no waking. Only for
// bodies that are short and share out most of what they do, as a step of the model: who waits spins at first.
void run_with_team(int num_threads, void (*run)(const void* body), const void* body);

template <class Body>
void parallel(int num_threads, const Body& body) {
  run_parallel(num_threads, [](const void* body, int thread) { (*(const Body*)body)(thread); }, &body);
}

// body(thread, begin, end) for as many ranges of 0 .. count as threads.
template <class Body>
void parallel_ranges(int num_threads, int64_t count, const Body& body) {
  parallel(num_threads, [&](int thread) {
    body(thread, count * thread / num_threads, count * (thread + 1) / num_threads);
  });
}

// body(thread, job) for jobs 0 .. num_jobs - 1, each taken by whoever is free.
template <class Body>
void parallel_jobs(int num_threads, int64_t num_jobs, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel((int)std::max<int64_t>(1, std::min<int64_t>(num_threads, num_jobs)), [&](int thread) {
    for (int64_t job; (job = next.fetch_add(1, std::memory_order_relaxed)) < num_jobs;) body(thread, job);
  });
}

template <class Body>
void with_team(int num_threads, const Body& body) {
  run_with_team(num_threads, [](const void* body) { (*(const Body*)body)(); }, &body);
}

}  // namespace kvarto
