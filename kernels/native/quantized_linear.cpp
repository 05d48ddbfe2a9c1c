// Quantizes rows of x and shares panels of a quantized weight x row blocks out among threads.
#include "quantized_linear.h"

#include <vector>

#include "panel_jobs.h"
#include "team.h"

namespace kvarto {

void multiply_codes(const KvartoLinear& call, const Isa& isa) {
  const auto multiply = call.weight_dtype == KVARTO_WEIGHT_INT8 ? isa.quantized_linear->int8_panel
                                                                 : isa.quantized_linear->int4_panel;
  const PanelJobs jobs(call);
  const int threads = jobs.num_threads();
  const int64_t num_groups = divide_up(call.k, CODE_GROUP), row_floats = num_groups * CODE_GROUP;
  // An odd number of cache lines keeps rows out of each other's cache sets.
  const int64_t stride = (divide_up(row_floats, 64) | 1) * 64;

  static thread_local std::vector<int8_t> codes;
  static thread_local std::vector<GroupScale> scales;
  static thread_local std::vector<float> floats;
  if ((int64_t)codes.size() < call.m * stride) codes.resize(call.m * stride);
  if ((int64_t)scales.size() < call.m * num_groups) scales.resize(call.m * num_groups);
  const int64_t sums_size = jobs.block() * PANEL, needed = threads * std::max(row_floats, sums_size);
  if ((int64_t)floats.size() < needed) floats.resize(needed);

  const RowCodes rows{codes.data(), scales.data(), stride, num_groups};
  float* scratch = floats.data();
  const int64_t row_bytes = call.x_stride * element_size(call.x_dtype);
  parallel_ranges(threads, call.m, [&](int thread, int64_t begin, int64_t end) {
    float* row = scratch + thread * row_floats;
    for (int64_t m = begin; m < end; ++m) {
      isa.linear->to_float[call.x_dtype]((const char*)call.x + m * row_bytes, call.k, row);
      isa.quantized_linear->to_codes(row, call.k, rows, m);
    }
  });
  jobs.run([&](int thread, int64_t panel, int64_t m_begin, int64_t m_end) {
    multiply(call, rows, panel, m_begin, m_end, scratch + thread * sums_size);
  });
}

}  // namespace kvarto
