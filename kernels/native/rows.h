// What a layer does with each token's row by itself: norms, rotary positions, gated activations.
#pragma once

#include "abi.h"

extern "C" {

// out = norm(x) * weight over the last dim elements; first x += addend, in x's dtype, where there is one.
// Heads of a token are dense; tokens are x_stride apart in x and in addend, out_stride in out, which may be x.
struct KvartoNorm {
  void* x;             // [num_tokens, heads, dim]; written only where there is an addend
  const void* addend;  // the same shape and stride, or null
  const void* weight;  // [dim]
  void* out;           // [num_tokens, heads, dim]
  int64_t num_tokens, heads, dim, x_stride, out_stride;
  float eps;
  int32_t plus_one;  // the weight is 1 + weight, and applied before the result is rounded
  int32_t dtype, isa, num_threads;
};

// Turns element j of each head with j + num_angles, in place.
struct KvartoRotation {
  void* heads;       // [num_tokens, num_heads, head_dim]
  const float* cos;  // [num_tokens, num_angles]
  const float* sin;
  int64_t num_tokens, num_heads, head_dim, num_angles, stride;
  int32_t dtype, isa, num_threads;
};

enum { KVARTO_SILU = 0, KVARTO_GELU_TANH, KVARTO_NUM_ACTIVATIONS };

// out = activation(x[:, :dim]) * x[:, dim:]
struct KvartoGate {
  const void* x;  // [num_tokens, 2 * dim], contiguous
  void* out;      // [num_tokens, dim], contiguous
  int64_t num_tokens, dim;
  int32_t activation, dtype, isa, num_threads;
};

// Of each row the largest element and its place, the first of equals; a NaN counts as +inf and is above everything.
struct KvartoBest {
  const void* x;  // [num_tokens, dim], rows x_stride elements apart
  float* values;  // [num_tokens]
  int64_t* ids;   // [num_tokens]
  int64_t num_tokens, dim, x_stride;
  int32_t dtype, isa, num_threads;
};

// out[t] = table[index[t] - first] * scale; of an index that names no row: zeros.
struct KvartoTake {
  const void* table;     // [num_rows, dim], contiguous
  const int64_t* index;  // [num_tokens]
  void* out;             // [num_tokens, dim], contiguous
  int64_t num_tokens, num_rows, dim, first;
  float scale;
  int32_t partial;  // whether an index may name no row
  int32_t dtype, isa, num_threads;
};

int32_t kvarto_best(const KvartoBest* call, int64_t* detail);
int32_t kvarto_take(const KvartoTake* call, int64_t* detail);
int32_t kvarto_norm(const KvartoNorm* call, int64_t* detail);
int32_t kvarto_rotate(const KvartoRotation* call, int64_t* detail);
int32_t kvarto_gate(const KvartoGate* call, int64_t* detail);
}

namespace kvarto {

// Of tokens [begin, end).
struct RowKernels {
  void (*norm[KVARTO_NUM_FLOATS])(const KvartoNorm&, int64_t begin, int64_t end);
  void (*rotate[KVARTO_NUM_FLOATS])(const KvartoRotation&, int64_t begin, int64_t end);
  void (*gate[KVARTO_NUM_FLOATS])(const KvartoGate&, int64_t begin, int64_t end);
  void (*best[KVARTO_NUM_FLOATS])(const KvartoBest&, int64_t begin, int64_t end);
  void (*take[KVARTO_NUM_FLOATS])(const KvartoTake&, int64_t begin, int64_t end);
};

}  // namespace kvarto
