// One packed panel of PANEL columns of a quantized weight times rows of x, quantized too. Built once per instruction set.
//
// The products of a group of codes are summed as integers; every output element is one float32 sum over groups
// 0, 1, 2, ...: the bits of a row do not depend on the rest of the batch.
#include "linear_panel.h"

namespace kvarto {
namespace KVARTO_ISA {

constexpr int64_t FOURS = CODE_GROUP / 4;
// Four codes of each column of a panel.
constexpr int64_t FOUR_BYTES = 4 * PANEL;

// The code of 0.
constexpr int32_t INT8_ZERO = 128;

// How a panel's part of a group lies: codes, four by four, and what makes numbers of them; kernels/quantized_weight.py.
struct Int8Codes {
  static constexpr int64_t SCALES = FOURS * FOUR_BYTES, BYTES = SCALES + 2 * PANEL;
  static constexpr bool HAS_MINS = false;

  // Codes of the group's four i, or, high, of that FOURS / 2 behind it.
  static KVARTO_MEMBER Bytes columns(const uint8_t* codes, int64_t i, bool high, int n) {
    return load_bytes(codes + (high ? FOURS / 2 + i : i) * FOUR_BYTES + n * 4 * WIDTH);
  }
};

struct Int4Codes {
  static constexpr int64_t SCALES = FOURS / 2 * FOUR_BYTES, MINS = SCALES + 2 * PANEL, BYTES = MINS + 2 * PANEL;
  static constexpr bool HAS_MINS = true;

  static KVARTO_MEMBER Bytes columns(const uint8_t* codes, int64_t i, bool high, int n) {
    const Bytes both = load_bytes(codes + i * FOUR_BYTES + n * 4 * WIDTH);
    return high ? high_nibbles(both) : low_nibbles(both);
  }
};

// products[R][PANEL] += four codes of each of R rows, `stride` bytes apart, times four columns.
template <int R>
KVARTO_INLINE void add_four(const int8_t* x, int64_t stride, const Bytes* columns, Ints (*products)[VECTORS]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const Bytes four = pinned(set1_four(x + r * stride));
    for (int n = 0; n < VECTORS; ++n) products[r][n] = add_products(columns[n], four, products[r][n]);
  }
}

// sums[R][PANEL] (+)= rows m .. m + R - 1 of x times groups [begin, end) of a panel, whose bytes begin at `weight`.
template <int R, class Codes>
KVARTO_INLINE void multiply_rows(const RowCodes& x, int64_t m, int64_t begin, int64_t end, const uint8_t* weight,
                                 Ahead ahead, float* sums) {
  for (int64_t group = begin; group < end; ++group, weight += Codes::BYTES, ahead.address += ahead.step_bytes) {
    for (int64_t byte = 0; byte < ahead.step_bytes; byte += CACHE_LINE) prefetch(ahead.address + byte);
    const int8_t* codes = x.codes + m * x.stride + group * CODE_GROUP;
    const GroupScale* scales = x.scales + m * x.num_groups + group;
    Ints products[R][VECTORS];
    for (int r = 0; r < R; ++r)
      for (int n = 0; n < VECTORS; ++n)
        products[r][n] = set1(Codes::HAS_MINS ? 0 : scales[r * x.num_groups].start);
#pragma GCC unroll 4
    for (int64_t i = 0; i < FOURS / 2; ++i)
#pragma GCC unroll 2
      for (int high = 0; high < 2; ++high) {
        Bytes columns[VECTORS];
        for (int n = 0; n < VECTORS; ++n) columns[n] = pinned(Codes::columns(weight, i, high, n));
        add_four<R>(codes + 4 * (high * FOURS / 2 + i), x.stride, columns, products);
      }
#pragma GCC unroll 4
    for (int n = 0; n < VECTORS; ++n) {
      const f16* column_scales = (const f16*)(weight + Codes::SCALES) + n * WIDTH;
      const Vec column_scale = load(column_scales);
      [[maybe_unused]] const Vec column_min = Codes::HAS_MINS ? load(column_scales + PANEL) : zero();
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const GroupScale of_row = scales[r * x.num_groups];
        float* sum = sums + r * PANEL + n * WIDTH;
        Vec total = group == 0 ? zero() : load(sum);
        total = fma(as_floats(products[r][n]), mul(column_scale, set1(of_row.scale)), total);
        if (Codes::HAS_MINS) total = fma(column_min, set1(of_row.sum), total);
        store(sum, total);
      }
    }
  }
}

// As multiply_rows, of `rows` <= R rows.
template <int R, class Codes>
static void multiply_few(int64_t rows, const RowCodes& x, int64_t m, int64_t begin, int64_t end, const uint8_t* weight,
                         Ahead ahead, float* sums) {
  if (rows == R) return multiply_rows<R, Codes>(x, m, begin, end, weight, ahead, sums);
  if constexpr (R > 1) multiply_few<R - 1, Codes>(rows, x, m, begin, end, weight, ahead, sums);
}

template <class Codes>
static void panel(const KvartoLinear& call, const RowCodes& x, int64_t panel, int64_t m_begin, int64_t m_end,
                  float* sums) {
  constexpr int R = MAX_QUANTIZED_ROWS;
  const int64_t rows = m_end - m_begin, all_bytes = x.num_groups * Codes::BYTES;
  const uint8_t* weight = (const uint8_t*)call.packed + panel * all_bytes;
  const bool read_once = rows <= R;
  const int64_t pieces = read_once ? 1 : divide_up(all_bytes, PIECE_BYTES), most = divide_up(x.num_groups, pieces);
  for (int64_t begin = 0; begin < x.num_groups; begin += most) {
    const int64_t end = x.num_groups < begin + most ? x.num_groups : begin + most;
    const uint8_t* piece = weight + begin * Codes::BYTES;
    // What follows in memory is taken for what is multiplied next.
    Ahead ahead{(const char*)piece + AHEAD_BYTES, Codes::BYTES};
    if (!read_once)
      ahead = {(const char*)weight + end * Codes::BYTES,
               divide_up(Codes::BYTES, divide_up(rows, R) * CACHE_LINE) * CACHE_LINE};
    for (int64_t row = 0, count; row < rows; row += count) {
      const int64_t left = rows - row;
      // Before few are left over, the last of them are halved.
      count = left >= 2 * R ? R : left > R ? (left + 1) / 2 : left;
      multiply_few<R, Codes>(count, x, m_begin + row, begin, end, piece, ahead, sums + row * PANEL);
      if (!read_once) ahead.address += (end - begin) * ahead.step_bytes;
    }
  }
  write_panel_as(call, panel, m_begin, rows, sums);
}

static void to_codes(float* x, int64_t k, const RowCodes& rows, int64_t m) {
  int8_t* codes = rows.codes + m * rows.stride;
  GroupScale* scales = rows.scales + m * rows.num_groups;
  for (int64_t i = k; i < rows.num_groups * CODE_GROUP; ++i) x[i] = 0.0f;
  const Vec round = set1(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  for (int64_t group = 0; group < rows.num_groups; ++group, x += CODE_GROUP, codes += CODE_GROUP) {
    Vec largest = zero(), finite = zero();  // 0, or NaN where the group is not
    for (int64_t i = 0; i < CODE_GROUP; i += WIDTH) {
      const Vec v = load(x + i);
      largest = max(max(v, sub(zero(), v)), largest);
      finite = add(finite, sub(v, v));
    }
    const float spoilt = reduce_add(finite);
    if (spoilt != spoilt) {
      memset(codes, 0, CODE_GROUP);
      scales[group] = {spoilt, spoilt, 0};
      continue;
    }
    const float scale = reduce_max(largest) / 127.0f;
    const bool used = scale >= 0x1p-126f;  // a denormal has no reciprocal
    const Vec factor = set1(used ? 1.0f / scale : 0.0f);
    Vec sum = zero();
    for (int64_t i = 0; i < CODE_GROUP; i += WIDTH) {
      const Vec whole = sub(add(mul(load(x + i), factor), round), round);
      sum = add(sum, whole);
      store_codes(codes + i, whole);
    }
    const float of_codes = reduce_add(sum);
    scales[group] = {used ? scale : 0.0f, scale * of_codes, -INT8_ZERO * (int32_t)of_codes};
  }
}

extern const QuantizedLinearKernels quantized_linear_kernels;
const QuantizedLinearKernels quantized_linear_kernels = {to_codes, panel<Int8Codes>, panel<Int4Codes>};

}  // namespace KVARTO_ISA
}  // namespace kvarto
