// What multiplying by a panel of a weight takes, be it floats or codes: bringing it near, writing the sums out.
#pragma once

#include "abi.h"
#include "simd.h"

namespace kvarto {
namespace KVARTO_ISA {

constexpr int VECTORS = PANEL / WIDTH;
// Of a piece of a panel that is multiplied several times: the next one, being brought near, fits in beside it.
constexpr int64_t PIECE_BYTES = 20480;
// How far ahead a panel that is read once is asked for: what the memory delivers while one line is on its way.
constexpr int64_t AHEAD_BYTES = 8192;
// An output so large does not wait in the caches for who reads it.
constexpr int64_t STREAM_BYTES = 16 << 20;
constexpr int64_t CACHE_LINE = 64;

static int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What to bring near meanwhile: the memory is to work all the time, and no processor follows a stream beyond a page.
struct Ahead {
  const char* address;
  int64_t step_bytes;  // per step
};

static Vec add_bias(const KvartoLinear& call, int64_t column, Vec sum) {
  return call.bias ? add(sum, load_some(call.bias + column, call.n - column)) : sum;
}

// Whole cache lines past the caches: reading each line first, to write into it, would cost as much again.
template <class T>
static void stream_panel(const KvartoLinear& call, int64_t first, int64_t m_begin, int64_t rows, const float* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    alignas(CACHE_LINE) T values[PANEL];
    for (int64_t c = 0; c < PANEL; c += WIDTH)
      store(values + c, add_bias(call, first + c, load(sums + r * PANEL + c)));
    char* out = (char*)((T*)call.out + (m_begin + r) * call.n + first);
    for (int64_t byte = 0; byte < (int64_t)sizeof values; byte += CACHE_LINE)
      stream_line(out + byte, (const char*)values + byte);
  }
  stream_end();
}

template <class T>
static void write_panel(const KvartoLinear& call, int64_t panel, int64_t m_begin, int64_t rows, const float* sums) {
  const int64_t first = panel * PANEL;
  const bool whole_lines = call.n % PANEL == 0 && (uintptr_t)call.out % CACHE_LINE == 0;
  if (whole_lines && call.m * call.n * (int64_t)sizeof(T) >= STREAM_BYTES)
    return stream_panel<T>(call, first, m_begin, rows, sums);
  for (int64_t r = 0; r < rows; ++r) {
    T* out = (T*)call.out + (m_begin + r) * call.n + first;
    for (int64_t c = 0; c < PANEL && first + c < call.n; c += WIDTH)
      store_some(out + c, add_bias(call, first + c, load(sums + r * PANEL + c)), call.n - first - c);
  }
}

static void write_panel_as(const KvartoLinear& call, int64_t panel, int64_t m_begin, int64_t rows, const float* sums) {
  switch (call.x_dtype) {
    case KVARTO_BF16: return write_panel<bf16>(call, panel, m_begin, rows, sums);
    case KVARTO_F16: return write_panel<f16>(call, panel, m_begin, rows, sums);
    default: return write_panel<float>(call, panel, m_begin, rows, sums);
  }
}

}  // namespace KVARTO_ISA
}  // namespace kvarto
