// Packs weights into panels and shares panels x row blocks out among threads.
#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "isa.h"
#include "team.h"

namespace kvarto {
namespace {

constexpr int64_t ROW_BLOCK = 192;  // rows of x per widened piece of a panel
constexpr int64_t WIDENED_FLOATS = 128 * PANEL;  // linear_isa.cpp: DEPTH * PANEL

// Where column c of row i lies in a panel; see load_pair in simd_*.inc.
int64_t place_in_panel(int64_t c, int64_t i, int64_t width, int32_t dtype, bool row_pairs) {
  if (row_pairs) return i / 2 * 2 * PANEL + c * 2 + i % 2;
  if (dtype != KVARTO_BF16) return i * PANEL + c;
  const int64_t pair = c / (2 * width), within = c % (2 * width);
  return i * PANEL + pair * 2 * width + within % width * 2 + within / width;
}

template <class T>
void pack(const T* weight, int64_t n, int64_t k, int64_t stride, const LinearKernels& kernels, int32_t dtype,
          T* packed) {
  const int64_t num_panels = divide_up(n, PANEL);
  const bool row_pairs = packs_row_pairs(kernels, dtype, k);
#pragma omp parallel for schedule(static)
  for (int64_t panel = 0; panel < num_panels; ++panel) {
    T* out = packed + panel * k * PANEL;
    for (int64_t c = 0; c < PANEL; ++c) {
      const int64_t column = panel * PANEL + c;
      for (int64_t i = 0; i < k; ++i)
        out[place_in_panel(c, i, kernels.width, dtype, row_pairs)] = column < n ? weight[column * stride + i] : T(0);
    }
  }
}

// Jobs 0, 1, 2, ... in one range per thread: neighbours go to the same one, which reads the weight as a stream. Who is
// through with its own range takes jobs of the others.
class Jobs {
 public:
  Jobs(int64_t num_jobs, int num_threads) : num_jobs_(num_jobs), num_threads_(num_threads) {
    if ((int64_t)next_.size() < num_threads * SPACING) next_.resize(num_threads * SPACING);
    for (int64_t thread = 0; thread < num_threads; ++thread) next_[thread * SPACING] = begin(thread);
    counters_ = next_.data();
  }

  template <class Run>
  void work(int64_t thread, Run run) const {
    for (int64_t turn = 0; turn < num_threads_; ++turn) {
      const int64_t owner = (thread + turn) % num_threads_, end = begin(owner + 1);
      for (int64_t job; (job = take(owner)) < end;) run(job);
    }
  }

 private:
  static constexpr int64_t SPACING = 8;  // a cache line per counter

  int64_t begin(int64_t thread) const { return thread * num_jobs_ / num_threads_; }
  int64_t take(int64_t owner) const {
    int64_t job;
#pragma omp atomic capture
    job = counters_[owner * SPACING]++;
    return job;
  }

  static thread_local std::vector<int64_t> next_;
  int64_t num_jobs_, num_threads_;
  int64_t* counters_;
};
thread_local std::vector<int64_t> Jobs::next_;

void run(const KvartoLinear& call, const LinearKernels& kernels) {
  const int64_t num_panels = divide_up(call.n, PANEL), num_blocks = divide_up(call.m, ROW_BLOCK);
  const int64_t num_jobs = num_panels * num_blocks, block = divide_up(call.m, std::max<int64_t>(num_blocks, 1));
  const bool as_it_is =
      call.x_dtype == KVARTO_BF16 && packs_row_pairs(kernels, call.weight_dtype, call.k);
  const auto multiply = as_it_is ? kernels.bf16_panel : kernels.panel[call.weight_dtype];
  // An odd multiple of a cache line keeps rows out of each other's cache sets.
  const int64_t wide_stride = divide_up(call.k, 16) * 16 + 16, wide_size = as_it_is ? 0 : call.m * wide_stride;
  const int64_t scratch_size = block * PANEL + WIDENED_FLOATS;
  const int64_t budget = call.m * call.n * call.k < SERIAL_WORK ? 1 : call.num_threads;
  const int threads = (int)std::max<int64_t>(1, std::min(budget, num_jobs));

  static thread_local std::vector<float> memory;
  const int64_t needed = wide_size + threads * scratch_size;
  if ((int64_t)memory.size() < needed) memory.resize(needed);
  float *wide = memory.data(), *scratch = wide + wide_size;
  const Jobs jobs(num_jobs, threads);
  const void* x = as_it_is ? call.x : wide;
  const int64_t x_stride = as_it_is ? call.x_stride : wide_stride;
  if (!as_it_is) {
    const int64_t row_bytes = call.x_stride * element_size(call.x_dtype);
    parallel_ranges(threads, call.m, [&](int, int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        kernels.to_float[call.x_dtype]((const char*)call.x + m * row_bytes, call.k, wide + m * wide_stride);
    });
  }
  parallel(threads, [&](int thread) {
    jobs.work(thread, [&](int64_t job) {
      const int64_t m = job % num_blocks * block;
      multiply(call, x, x_stride, job / num_blocks, m, std::min(m + block, call.m), scratch + thread * scratch_size);
    });
  });
}

}  // namespace
}  // namespace kvarto

extern "C" {

int64_t kvarto_packed_elements(int64_t n, int64_t k) { return kvarto::divide_up(n, kvarto::PANEL) * kvarto::PANEL * k; }

void kvarto_pack_linear(const void* weight, int64_t n, int64_t k, int64_t stride, int32_t dtype, int32_t isa,
                        void* packed) {
  const kvarto::LinearKernels& kernels = *kvarto::find_isa(isa)->linear;
  if (dtype == KVARTO_F32)
    kvarto::pack((const uint32_t*)weight, n, k, stride, kernels, dtype, (uint32_t*)packed);
  else
    kvarto::pack((const uint16_t*)weight, n, k, stride, kernels, dtype, (uint16_t*)packed);
}

int32_t kvarto_linear(const KvartoLinear* call, int64_t*) try {
  kvarto::run(*call, *kvarto::find_isa(call->isa)->linear);
  return KVARTO_OK;
} catch (const std::bad_alloc&) {
  return KVARTO_NO_MEMORY;
}
}
