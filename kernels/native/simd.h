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

namespace kvarto {
namespace KVARTO_ISA {

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

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

// 2^x for x <= 0 within 2 ulp; 0 below 2^-126 (so exp2(-inf) is 0), exactly 1 at 0; NaN stays.
KVARTO_INLINE Vec exp2(Vec x) {
  const Vec lowest = set1(-126.0f), round = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vec clamped = max(lowest, x);
  const Vec shifted = add(clamped, round);
  const Vec f = sub(clamped, sub(shifted, round));
  Vec p = set1(0x1.444004p-13f);
  p = fma(p, f, set1(0x1.5f0896p-10f));
  p = fma(p, f, set1(0x1.3b2a1cp-7f));
  p = fma(p, f, set1(0x1.c6af6cp-5f));
  p = fma(p, f, set1(0x1.ebfbe0p-3f));
  p = fma(p, f, set1(0x1.62e430p-1f));
  p = fma(p, f, set1(1.0f));
  return zero_where_less(scale_by_power(p, shifted), x, lowest);
}

KVARTO_INLINE float exp2(float x) {
  float lanes[WIDTH];
  store(lanes, exp2(set1(x)));
  return lanes[0];
}

KVARTO_INLINE void prefetch(const void* address) { __builtin_prefetch(address, 0, 3); }

}  // namespace KVARTO_ISA
}  // namespace kvarto
