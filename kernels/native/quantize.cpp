#include "quantize.h"

#include <cstring>

#include "abi.h"

namespace kvarto {
namespace {

constexpr uint32_t INFINITY_BITS = 0x7f800000;
constexpr float LARGEST_I8 = 127.0f, LARGEST_F8 = 31.0f;

uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

float clamped(float x, float limit) { return x < -limit ? -limit : x > limit ? limit : x; }

// Adding 1.5 * 2^23 rounds to the nearest even integer.
int8_t to_i8(float x) { return (int8_t)(clamped(x, LARGEST_I8) + 12582912.0f - 12582912.0f); }

// E3M4, rounded to nearest even.
uint8_t to_f8(float x) {
  const uint32_t bits = bits_of(clamped(x, LARGEST_F8)), magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - (124u << 23) + 0x3ffff + ((magnitude >> 19) & 1)) >> 19;
  // Adding 2^17 rounds to a multiple of 2^-6, the step below 2^-2.
  const uint32_t denormal = bits_of(float_of(magnitude) + 0x1p17f) - bits_of(0x1p17f);
  return (uint8_t)((magnitude < bits_of(0x1p-2f) ? denormal : normal) | ((bits >> 24) & 0x80));
}

template <class Encode>
void encode_row(const float* x, int64_t dim, float scale, uint8_t* codes, Encode encode) {
  for (int64_t d = 0; d < dim; ++d) codes[d] = (uint8_t)encode(x[d] / scale);
}

}  // namespace

float quantize_row(const float* x, int64_t dim, int32_t dtype, void* codes) {
  uint32_t largest = 0;  // magnitudes order like their bits, and NaN comes last
  for (int64_t d = 0; d < dim; ++d) {
    const uint32_t magnitude = bits_of(x[d]) & 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float scale = float_of(largest) / (dtype == KVARTO_I8 ? LARGEST_I8 : LARGEST_F8);
  if (largest >= INFINITY_BITS || scale == 0.0f) {
    memset(codes, 0, dim);
    return largest >= INFINITY_BITS ? float_of(0x7fc00000) : 0.0f;
  }
  if (dtype == KVARTO_I8) encode_row(x, dim, scale, (uint8_t*)codes, to_i8);
  else encode_row(x, dim, scale, (uint8_t*)codes, to_f8);
  return scale;
}

}  // namespace kvarto
