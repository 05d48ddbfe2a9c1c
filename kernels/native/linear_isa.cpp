// One packed panel of PANEL weight columns times rows of x. Built once per instruction set.
//
// Every output element is one float32 sum over k = 0, 1, 2, ... (of products, or of the sums of two) in its own lane,
// whatever the number of rows: the bits of a row do not depend on the rest of the batch.
#include "linear_panel.h"

namespace kvarto {
namespace KVARTO_ISA {

// Depth of a widened piece of a panel: 16 KiB, half of a first-level cache.
constexpr int64_t DEPTH = 128;
// Few rows are multiplied with the packed weight as it is: widening it would not pay.
constexpr int64_t DIRECT_ROWS = 16;

static_assert(VECTORS % 2 == 0, "16-bit columns are packed in pairs of vectors");

// How elements of x meet a packed weight of T: how many rows of it one step takes, and as what.
template <class X, class T>
struct Product;

template <class T>
struct Product<float, T> {
  static constexpr int64_t STEP = 1;
  using Operand = Vec;
  static KVARTO_MEMBER void columns(const T* row, Vec* out) {
    for (int n = 0; n < VECTORS; n += 2) load_pair(row + n * WIDTH, out[n], out[n + 1]);
  }
  static KVARTO_MEMBER Vec factor(const float* x) { return set1(*x); }
};
// Widened pieces are in column order.
template <>
struct Product<float, float> {
  static constexpr int64_t STEP = 1;
  using Operand = Vec;
  static KVARTO_MEMBER void columns(const float* row, Vec* out) {
    for (int n = 0; n < VECTORS; ++n) out[n] = load(row + n * WIDTH);
  }
  static KVARTO_MEMBER Vec factor(const float* x) { return set1(*x); }
};
#if defined(__AVX512BF16__)
template <>
struct Product<bf16, bf16> {
  static constexpr int64_t STEP = 2;
  using Operand = Pairs;
  static KVARTO_MEMBER void columns(const bf16* rows, Pairs* out) {
    for (int n = 0; n < VECTORS; ++n) out[n] = load_pairs(rows + n * 2 * WIDTH);
  }
  static KVARTO_MEMBER Pairs factor(const bf16* x) { return set1_pair(x); }
};
#endif

// sums[R][PANEL] (+)= x[R][depth] * weight[depth][PANEL].
template <int R, class X, class T>
KVARTO_INLINE void multiply_rows(const X* x, int64_t x_stride, const T* weight, int64_t depth, bool from_zero,
                                 Ahead ahead, float* sums) {
  using P = Product<X, T>;
  Vec held[R][VECTORS];
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < VECTORS; ++n) held[r][n] = from_zero ? zero() : load(sums + r * PANEL + n * WIDTH);
  for (int64_t k = 0; k < depth; k += P::STEP) {
    const T* row = weight + k * PANEL;
    prefetch(ahead.address);
    if (ahead.step_bytes > CACHE_LINE) prefetch(ahead.address + CACHE_LINE);
    ahead.address += ahead.step_bytes;
    typename P::Operand columns[VECTORS], factor[R];
    P::columns(row, columns);
    for (int r = 0; r < R; ++r) factor[r] = pinned(P::factor(x + r * x_stride + k));
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) {
      const auto column = pinned(columns[n]);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) held[r][n] = fma(factor[r], column, held[r][n]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int n = 0; n < VECTORS; ++n) store(sums + r * PANEL + n * WIDTH, held[r][n]);
}

// As multiply_rows, of `rows` <= R rows.
template <int R, class X, class T>
static void multiply_few(int64_t rows, const X* x, int64_t x_stride, const T* weight, int64_t depth, bool from_zero,
                         Ahead ahead, float* sums) {
  if (rows == R) return multiply_rows<R>(x, x_stride, weight, depth, from_zero, ahead, sums);
  if constexpr (R > 1) multiply_few<R - 1>(rows, x, x_stride, weight, depth, from_zero, ahead, sums);
}

// R: most rows that share each load of the weight. Before few are left over, the last of them are halved. Meanwhile
// ahead_bytes from `ahead` on are brought near.
template <int R, class X, class T>
static void multiply_block(int64_t rows, const X* x, int64_t x_stride, const T* weight, int64_t depth, bool from_zero,
                           const void* ahead, int64_t ahead_bytes, float* sums) {
  const int64_t steps = depth / Product<X, T>::STEP, groups = divide_up(rows, R);
  Ahead next{(const char*)ahead, divide_up(ahead_bytes, steps * groups)};
  for (int64_t count; rows > 0; rows -= count, x += count * x_stride, sums += count * PANEL) {
    count = rows >= 2 * R ? R : rows > R ? (rows + 1) / 2 : rows;
    multiply_few<R>(count, x, x_stride, weight, depth, from_zero, next, sums);
    next.address += steps * next.step_bytes;
  }
}

// sums = x * the panel, as it is. The panel behind it in memory is taken for the next one.
template <int R, class X, class T>
static void multiply_panel(int64_t rows, const X* x, int64_t x_stride, const T* weight, int64_t k, float* sums) {
  constexpr int64_t STEP = Product<X, T>::STEP, ROW_BYTES = PANEL * sizeof(T);
  if (rows <= R) {
    const char* ahead = (const char*)weight + AHEAD_BYTES;
    return multiply_block<R>(rows, x, x_stride, weight, k, true, ahead, k * ROW_BYTES, sums);
  }
  const int64_t pieces = divide_up(k * ROW_BYTES, PIECE_BYTES), most = divide_up(k, pieces * STEP) * STEP;
  for (int64_t begin = 0; begin < k; begin += most) {
    const int64_t depth = k - begin < most ? k - begin : most;
    const T *piece = weight + begin * PANEL, *ahead = piece + depth * PANEL;
    multiply_block<R>(rows, x + begin, x_stride, piece, depth, begin == 0, ahead, depth * ROW_BYTES, sums);
  }
}

template <class T>
static void widen(const T* weight, int64_t depth, bool row_pairs, float* wide) {
  for (int64_t i = 0; i < depth; i += 1 + row_pairs) {
    const T* rows = weight + i * PANEL;
    float* out = wide + i * PANEL;
    Vec first, second;
    if (row_pairs)
      for (int64_t c = 0; c < PANEL; c += WIDTH) {
        load_pair(rows + 2 * c, first, second);
        store(out + c, first), store(out + PANEL + c, second);
      }
    else
      for (int64_t c = 0; c < PANEL; c += 2 * WIDTH) {
        load_pair(rows + c, first, second);
        store(out + c, first), store(out + c + WIDTH, second);
      }
  }
}

extern const LinearKernels linear_kernels;

// scratch: [m_end - m_begin, PANEL] sums, then [DEPTH, PANEL] widened weights.
template <class T>
static void panel(const KvartoLinear& call, const void* all_x, int64_t x_stride, int64_t panel, int64_t m_begin,
                  int64_t m_end, float* scratch) {
  const T* weight = (const T*)call.packed + panel * call.k * PANEL;
  const int64_t rows = m_end - m_begin;
  const bool row_pairs = packs_row_pairs(linear_kernels, call.weight_dtype, call.k);
  const float* x = (const float*)all_x + m_begin * x_stride;
  float *sums = scratch, *wide = scratch + rows * PANEL;
  if (rows <= DIRECT_ROWS && !row_pairs) {
    constexpr int R = sizeof(T) == 4 ? MAX_LINEAR_ROWS : MAX_DIRECT_LINEAR_ROWS;
    multiply_panel<R>(rows, x, x_stride, weight, call.k, sums);
  } else {
    for (int64_t k = 0; k < call.k; k += DEPTH) {
      const int64_t depth = call.k - k < DEPTH ? call.k - k : DEPTH;
      const T *piece = weight + k * PANEL, *ahead = piece + depth * PANEL;
      widen(piece, depth, row_pairs, wide);
      multiply_block<MAX_LINEAR_ROWS>(rows, x + k, x_stride, (const float*)wide, depth, k == 0, ahead,
                                      depth * PANEL * (int64_t)sizeof(T), sums);
    }
  }
  write_panel_as(call, panel, m_begin, rows, sums);
}

#if defined(__AVX512BF16__)
static void bf16_panel(const KvartoLinear& call, const void* all_x, int64_t x_stride, int64_t panel, int64_t m_begin,
                       int64_t m_end, float* sums) {
  const bf16* weight = (const bf16*)call.packed + panel * call.k * PANEL;
  const bf16* x = (const bf16*)all_x + m_begin * x_stride;
  multiply_panel<MAX_LINEAR_ROWS>(m_end - m_begin, x, x_stride, weight, call.k, sums);
  write_panel_as(call, panel, m_begin, m_end - m_begin, sums);
}
#else
constexpr decltype(LinearKernels::bf16_panel) bf16_panel = nullptr;
#endif

template <class T>
static void to_float(const void* x, int64_t count, float* out) {
  for (int64_t i = 0; i < count; i += WIDTH) store_some(out + i, load_some((const T*)x + i, count - i), count - i);
}

const LinearKernels linear_kernels = {
    WIDTH, {to_float<float>, to_float<bf16>, to_float<f16>}, {panel<float>, panel<bf16>, panel<f16>}, bf16_panel};

}  // namespace KVARTO_ISA
}  // namespace kvarto
