// The instruction sets this library was built for, least first.
#pragma once

#include "abi.h"
#include "exchange.h"
#include "rows.h"
#include "sparsity.h"

namespace kvarto {

struct Isa {
  const char* name;
  const AttentionKernels* attention;
  const LinearKernels* linear;
  const QuantizedLinearKernels* quantized_linear;
  const RowKernels* rows;
  const ScoreKernels* scores;
  const ExchangeKernels* exchange;
};

constexpr int64_t SERIAL_WORK = 1 << 18;  // multiplications below which waking threads costs more than it saves

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Null unless isa was built and this processor runs it.
const Isa* find_isa(int32_t isa);

inline bool is_quantized(int32_t dtype) { return dtype >= KVARTO_NUM_FLOATS; }

inline int64_t element_size(int32_t dtype) { return dtype == KVARTO_F32 ? 4 : is_quantized(dtype) ? 1 : 2; }

// Bytes of one head of one block of a cache.
inline int64_t head_bytes(const KvartoCache& cache) {
  return cache.block_size * (cache.head_dim * element_size(cache.dtype) + (is_quantized(cache.dtype) ? 4 : 0));
}

}  // namespace kvarto
