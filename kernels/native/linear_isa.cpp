// One packed panel of PANEL weight columns times rows of x. Built once per instruction set.
//
// Every output element is one float32 sum over k = 0, 1, 2, ... in its own lane, whatever the
// number of rows: the bits of a row do not depend on the rest of the batch.
#include "abi.h"
#include "simd.h"

namespace kvarto {
namespace KVARTO_ISA {

constexpr int VECTORS = PANEL / WIDTH;
// Depth of a widened piece of a panel: 16 KiB, half of a first-level cache.
constexpr int64_t DEPTH = 128;
// Few rows are multiplied with the packed weight as it is: widening it would not pay.
constexpr int64_t DIRECT_ROWS = 16;
constexpr int64_t PREFETCH_BYTES = 2048;

static_assert(VECTORS % 2 == 0, "16-bit columns are packed in pairs of vectors");

template <class T>
KVARTO_INLINE void load_panel_row(const T* row, Vec* out) {
  for (int n = 0; n < VECTORS; n += 2) load_pair(row + n * WIDTH, out[n], out[n + 1]);
}
// Widened pieces are in column order.
KVARTO_INLINE void load_panel_row(const float* row, Vec* out) {
  for (int n = 0; n < VECTORS; ++n) out[n] = load(row + n * WIDTH);
}

// sums[R][PANEL] (+)= x[R][depth] * weight[depth][PANEL]
template <int R, class T>
KVARTO_INLINE void multiply_rows(const float* x, int64_t x_stride, const T* weight, int64_t depth, bool from_zero,
                                 float* sums) {
  Vec held[R][VECTORS];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < VECTORS; ++n) held[r][n] = from_zero ? zero() : load(sums + r * PANEL + n * WIDTH);
  for (int64_t k = 0; k < depth; ++k) {
    const T* row = weight + k * PANEL;
    if (R == 1)
      for (int64_t byte = 0; byte < PANEL * (int64_t)sizeof(T); byte += 64)
        prefetch((const char*)row + PREFETCH_BYTES + byte);
    Vec columns[VECTORS], factor[R];
    load_panel_row(row, columns);
    for (int r = 0; r < R; ++r) factor[r] = pinned(set1(x[r * x_stride + k]));
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) {
      const Vec column = pinned(columns[n]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) held[r][n] = fma(factor[r], column, held[r][n]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < VECTORS; ++n) store(sums + r * PANEL + n * WIDTH, held[r][n]);
}

template <int R, class T>
static void multiply_block(int64_t rows, const float* x, int64_t x_stride, const T* weight, int64_t depth,
                           bool from_zero, float* sums) {
  for (; rows >= R; rows -= R, x += R * x_stride, sums += R * PANEL)
    multiply_rows<R>(x, x_stride, weight, depth, from_zero, sums);
  if constexpr (R > 1) {
    if (rows > 0) multiply_block<R - 1>(rows, x, x_stride, weight, depth, from_zero, sums);
  }
}

template <class T>
static void write_panel(const KvartoLinear& call, int64_t panel, int64_t m_begin, int64_t rows, const float* sums) {
  const int64_t first = panel * PANEL;
  for (int64_t r = 0; r < rows; ++r) {
    T* out = (T*)call.out + (m_begin + r) * call.n + first;
    for (int64_t c = 0; c < PANEL && first + c < call.n; c += WIDTH) {
      const int64_t left = call.n - first - c;
      const Vec sum = load(sums + r * PANEL + c);
      store_some(out + c, call.bias ? add(sum, load_some(call.bias + first + c, left)) : sum, left);
    }
  }
}

// scratch: [m_end - m_begin, PANEL] sums, then [DEPTH, PANEL] widened weights.
template <class T>
static void panel(const KvartoLinear& call, const float* x, int64_t x_stride, int64_t panel, int64_t m_begin,
                  int64_t m_end, float* scratch) {
  const T* weight = (const T*)call.packed + panel * call.k * PANEL;
  const int64_t rows = m_end - m_begin;
  float *sums = scratch, *wide = scratch + rows * PANEL;
  x += m_begin * x_stride;
  if (rows <= DIRECT_ROWS) {
    multiply_block<sizeof(T) == 4 ? MAX_LINEAR_ROWS : MAX_DIRECT_LINEAR_ROWS>(rows, x, x_stride, weight, call.k, true, sums);
  } else {
    for (int64_t k = 0; k < call.k; k += DEPTH) {
      const int64_t depth = call.k - k < DEPTH ? call.k - k : DEPTH;
      for (int64_t i = 0; i < depth; ++i) {
        Vec columns[VECTORS];
        load_panel_row(weight + (k + i) * PANEL, columns);
        for (int n = 0; n < VECTORS; ++n) store(wide + i * PANEL + n * WIDTH, columns[n]);
      }
      multiply_block<MAX_LINEAR_ROWS>(rows, x + k, x_stride, (const float*)wide, depth, k == 0, sums);
    }
  }
  switch (call.x_dtype) {
    case KVARTO_BF16: return write_panel<bf16>(call, panel, m_begin, rows, sums);
    case KVARTO_F16: return write_panel<f16>(call, panel, m_begin, rows, sums);
    default: return write_panel<float>(call, panel, m_begin, rows, sums);
  }
}

template <class T>
static void to_float(const void* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += WIDTH) store_some(out + i, load_some((const T*)x + i, count - i), count - i);
}

extern const LinearKernels linear_kernels;
const LinearKernels linear_kernels = {
    WIDTH, {to_float<float>, to_float<bf16>, to_float<f16>}, {panel<float>, panel<bf16>, panel<f16>}};

}  // namespace KVARTO_ISA
}  // namespace kvarto
