// One vector type per instruction set: `Vec` holds WIDTH floats. Everything here lives in a
// namespace of its own per instruction set and uses no standard library template, so that the
// linker can never hand AVX-512 code to a machine without it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define KVARTO_INLINE static inline __attribute__((always_inline))
#define KVARTO_MEMBER inline __attribute__((always_inline))

namespace kvarto {
namespace KVARTO_ISA {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
// Codes of quantized rows: what `load` gives is to be multiplied by the row's scale.
struct i8 { int8_t bits; };
struct f8 { uint8_t bits; };  // E3M4

template <class T> constexpr bool QUANTIZED = false;
template <> constexpr bool QUANTIZED<i8> = true;
template <> constexpr bool QUANTIZED<f8> = true;

#if defined(__AVX512F__)
#include "simd_avx512.inc"
#elif defined(__AVX2__)
#include "simd_avx2.inc"
#else
#include "simd_portable.inc"
#endif

template <class T>
KVARTO_INLINE void store_some(T* out, Vec v, int64_t count) {
  if (count >= WIDTH) return store(out, v);
  T lanes[WIDTH];
  store(lanes, v);
  memcpy(out, lanes, count * sizeof(T));
}

// Reads count < WIDTH values and nothing behind them; the other lanes are zero.
template <class T>
KVARTO_INLINE Vec load_some(const T* in, int64_t count) {
  if (count >= WIDTH) return load(in);
  T lanes[WIDTH] = {};
  memcpy(lanes, in, count * sizeof(T));
  return load(lanes);
}

#if !defined(__AVX512F__)  // which has instructions for both
// x, but at least -126, less the integer n nearest to it; whole = 1.5 * 2^23 + n.
KVARTO_INLINE Vec split_exponent(Vec x, Vec& whole) {
  const Vec clamped = max(set1(-126.0f), x), round = set1(12582912.0f);  // adding it rounds to an integer
  whole = add(clamped, round);
  return sub(clamped, sub(whole, round));
}
// p * 2^n; 0 where x < -126.
KVARTO_INLINE Vec scale_by_power(Vec p, Vec whole, Vec x) {
  return zero_where_less(add_to_exponent(p, whole), x, set1(-126.0f));
}
#endif

// 2^x for x < 127 within 2 ulp; 0 below 2^-126 (so exp2(-inf) is 0), exactly 1 at 0; NaN stays.
KVARTO_INLINE Vec exp2(Vec x) {
  Vec whole;
  const Vec f = split_exponent(x, whole);
  Vec p = set1(0x1.444004p-13f);
  p = fma(p, f, set1(0x1.5f0896p-10f));
  p = fma(p, f, set1(0x1.3b2a1cp-7f));
  p = fma(p, f, set1(0x1.c6af6cp-5f));
  p = fma(p, f, set1(0x1.ebfbe0p-3f));
  p = fma(p, f, set1(0x1.62e430p-1f));
  p = fma(p, f, set1(1.0f));
  return scale_by_power(p, whole, x);
}

// Within 4 ulp; exactly +-1 far out; NaN stays.
KVARTO_INLINE Vec tanh(Vec x) {
  const Vec magnitude = max(x, sub(zero(), x)), one = set1(1.0f);
  // Far from 0, (1 - t) / (1 + t) with t = e^(-2 |x|).
  const Vec t = exp2(mul(magnitude, set1(-2.8853900817779268f)));
  Vec far = div(sub(one, t), add(one, t));
  far = sub(far, mul(set1(2.0f), zero_where_less(far, zero(), x)));
  // Near 0 that would cancel; the polynomial is that of Cephes (Moshier).
  const Vec square = mul(x, x);
  Vec p = set1(-5.70498872745e-3f);
  p = fma(p, square, set1(2.06390887954e-2f));
  p = fma(p, square, set1(-5.37397155531e-2f));
  p = fma(p, square, set1(1.33314422036e-1f));
  p = fma(p, square, set1(-3.33332819422e-1f));
  const Vec near = fma(mul(p, square), x, x);
  // 0.625 and the float below it: exactly one of the two is zeroed.
  return add(zero_where_less(far, magnitude, set1(0.625f)), zero_where_less(near, set1(0x1.3ffffep-1f), magnitude));
}

KVARTO_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }
KVARTO_INLINE void prefetch_far(const void* address) { __builtin_prefetch(address, 0, 2); }
KVARTO_INLINE void prefetch_once(const void* address) { __builtin_prefetch(address, 0, 0); }

}  // namespace KVARTO_ISA
}  // namespace kvarto
