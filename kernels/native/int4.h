// How K and V of one head of one block lie in an int4 cache; kernels/kv_layout.py says what they mean.
#pragma once

#include <cstdint>

namespace kvarto {

// Offsets of its parts, in bytes. Codes are rows of head_dim / 2 bytes; value_zeros are block_size / 2.
struct Int4Head {
  int64_t value_codes, key_scales, value_scales, key_zeros, value_zeros, bytes;
};

// Static: drivers and kernels must not share a copy.
static inline Int4Head int4_head(int64_t block_size, int64_t head_dim) {
  Int4Head head;
  head.value_codes = block_size * head_dim / 2;
  head.key_scales = 2 * head.value_codes;
  head.value_scales = head.key_scales + 2 * head_dim;
  head.key_zeros = head.value_scales + 2 * block_size;
  head.value_zeros = head.key_zeros + head_dim;
  head.bytes = head.value_zeros + block_size / 2;
  return head;
}

}  // namespace kvarto
