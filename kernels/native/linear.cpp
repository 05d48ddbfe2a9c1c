// Packs weights into panels and shares panels x row blocks out among threads.
#include <cstring>
#include <new>
#include <vector>

#include "isa.h"
#include "panel_jobs.h"
#include "quantized_linear.h"
#include "team.h"

namespace kvarto {
namespace {

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

void run(const KvartoLinear& call, const LinearKernels& kernels) {
  const PanelJobs jobs(call);
  const bool as_it_is =
      call.x_dtype == KVARTO_BF16 && packs_row_pairs(kernels, call.weight_dtype, call.k);
  const auto multiply = as_it_is ? kernels.bf16_panel : kernels.panel[call.weight_dtype];
  // An odd multiple of a cache line keeps rows out of each other's cache sets.
  const int64_t wide_stride = divide_up(call.k, 16) * 16 + 16, wide_size = as_it_is ? 0 : call.m * wide_stride;
  const int64_t scratch_size = jobs.block() * PANEL + WIDENED_FLOATS;
  const int threads = jobs.num_threads();

  static thread_local std::vector<float> memory;
  const int64_t needed = wide_size + threads * scratch_size;
  if ((int64_t)memory.size() < needed) memory.resize(needed);
  float *wide = memory.data(), *scratch = wide + wide_size;
  const void* x = as_it_is ? call.x : wide;
  const int64_t x_stride = as_it_is ? call.x_stride : wide_stride;
  if (!as_it_is) {
    const int64_t row_bytes = call.x_stride * element_size(call.x_dtype);
    parallel_ranges(threads, call.m, [&](int, int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m)
        kernels.to_float[call.x_dtype]((const char*)call.x + m * row_bytes, call.k, wide + m * wide_stride);
    });
  }
  jobs.run([&](int thread, int64_t panel, int64_t m_begin, int64_t m_end) {
    multiply(call, x, x_stride, panel, m_begin, m_end, scratch + thread * scratch_size);
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
  const kvarto::Isa& isa = *kvarto::find_isa(call->isa);
  if (call->weight_dtype == KVARTO_WEIGHT_INT8 || call->weight_dtype == KVARTO_WEIGHT_INT4)
    kvarto::multiply_codes(*call, isa);
  else
    kvarto::run(*call, *isa.linear);
  return KVARTO_OK;
} catch (const std::bad_alloc&) {
  return KVARTO_NO_MEMORY;
}
}
