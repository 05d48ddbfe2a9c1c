// Quantizes whole blocks of the residual into an int4 cache; kernels/kv_layout.py has the formula.
#include <cstring>

#include "int4.h"
#include "isa.h"
#include "team.h"

namespace kvarto {
namespace {

constexpr float LARGEST_CODE = 15.0f, LARGEST_ZERO = 120.0f;
constexpr int64_t MAX_BLOCK_SIZE = 128;

// To the nearest even integer, below 2^22.
inline float rounded(float x) { return x + 12582912.0f - 12582912.0f; }

inline float smaller(float a, float b) { return a < b ? a : b; }
inline float larger(float a, float b) { return a > b ? a : b; }
inline float magnitude(float x) { return x < 0.0f ? -x : x; }

// What is known of vectors, then what their codes are made with: side by side, so that loops over them vectorise.
template <int64_t N>
struct Vectors {
  float low[N], high[N], finite[N];  // finite: 0, or NaN where the vector is not
  float divisor[N], zero[N], limit[N];

  // For ranges that include those from low_end to high_end.
  void clear(int64_t count, float low_end, float high_end) {
    for (int64_t i = 0; i < count; ++i) low[i] = low_end, high[i] = high_end, finite[i] = 0.0f;
  }

  void see(int64_t i, float x) {
    low[i] = smaller(x, low[i]), high[i] = larger(x, high[i]);
    finite[i] += x - x;
  }

  // Writes the scales, as bfloat16.
  void settle(int64_t count, char* scales) {
    for (int64_t i = 0; i < count; ++i) {
      // Where the range has a 0 in it, the first is never the smaller.
      const float largest = larger(magnitude(low[i]), magnitude(high[i]));
      float scale = larger((high[i] - low[i]) / LARGEST_CODE, largest / LARGEST_ZERO) + finite[i];
      uint32_t bits;
      memcpy(&bits, &scale, sizeof bits);
      bits = (bits + 0xffff) & 0xffff0000;  // up to the next of bfloat16
      const bool is_number = scale == scale;  // the bits of a NaN may have wrapped around
      memcpy(&scale, &bits, sizeof scale);
      const bool is_finite = is_number && scale < __builtin_inff(), used = is_finite && scale > 0.0f;
      const uint16_t stored = is_finite ? bits >> 16 : 0x7fc0;
      memcpy(scales + i * sizeof stored, &stored, sizeof stored);
      divisor[i] = used ? scale : 1.0f;
      zero[i] = used ? larger(-128.0f, smaller(127.0f, rounded(-low[i] / scale))) : 0.0f;
      limit[i] = used ? LARGEST_CODE : 0.0f;
    }
  }

  // Of an x that is NaN: 0.
  int32_t code(int64_t i, float x) const {
    return (int32_t)smaller(larger(rounded(x / divisor[i]) + zero[i], 0.0f), limit[i]);
  }
};

void pack(const uint8_t* codes, int64_t half, char* out) {
  for (int64_t d = 0; d < half; ++d) out[d] = (char)(codes[d] | codes[half + d] << 4);
}

struct Quantizer {
  const KvartoCache& residual;
  void (*to_float)(const void*, int64_t, float*);
  Int4Head layout;
  int64_t row_bytes;

  void keys(const char* rows, char* head) const {
    const int64_t dim = residual.head_dim, half = dim / 2;
    Vectors<MAX_HEAD_DIM> channels;
    float x[MAX_HEAD_DIM];
    channels.clear(dim, __builtin_inff(), -__builtin_inff());
    for (int64_t row = 0; row < residual.block_size; ++row) {
      to_float(rows + row * row_bytes, dim, x);
      for (int64_t d = 0; d < dim; ++d) channels.see(d, x[d]);
    }
    channels.settle(dim, head + layout.key_scales);
    for (int64_t d = 0; d < dim; ++d) head[layout.key_zeros + d] = (char)(int8_t)channels.zero[d];
    for (int64_t row = 0; row < residual.block_size; ++row) {
      uint8_t codes[MAX_HEAD_DIM];
      to_float(rows + row * row_bytes, dim, x);
      for (int64_t d = 0; d < dim; ++d) codes[d] = (uint8_t)channels.code(d, x[d]);
      pack(codes, half, head + row * half);
    }
  }

  void values(const char* rows, char* head) const {
    constexpr int64_t COLUMNS = 8;  // every head_dim is a multiple of it
    const int64_t dim = residual.head_dim, half = dim / 2, size = residual.block_size;
    Vectors<MAX_BLOCK_SIZE> found;
    float x[MAX_HEAD_DIM];
    found.clear(size, 0.0f, 0.0f);
    for (int64_t row = 0; row < size; ++row) {
      to_float(rows + row * row_bytes, dim, x);
      Vectors<COLUMNS> columns;
      columns.clear(COLUMNS, 0.0f, 0.0f);
      for (int64_t d = 0; d < dim; d += COLUMNS)
        for (int64_t i = 0; i < COLUMNS; ++i) columns.see(i, x[d + i]);
      for (int64_t i = 0; i < COLUMNS; ++i) {
        found.low[row] = smaller(columns.low[i], found.low[row]);
        found.high[row] = larger(columns.high[i], found.high[row]);
        found.finite[row] += columns.finite[i];
      }
    }
    found.settle(size, head + layout.value_scales);
    uint8_t zeros[MAX_BLOCK_SIZE];
    for (int64_t row = 0; row < size; ++row) zeros[row] = (uint8_t)found.zero[row];
    pack(zeros, size / 2, head + layout.value_zeros);
    for (int64_t row = 0; row < size; ++row) {
      uint8_t codes[MAX_HEAD_DIM];
      to_float(rows + row * row_bytes, dim, x);
      for (int64_t d = 0; d < dim; ++d) codes[d] = (uint8_t)found.code(row, x[d]);
      pack(codes, half, head + layout.value_codes + row * half);
    }
  }
};

}  // namespace
}  // namespace kvarto

extern "C" int32_t kvarto_quantize_blocks(const KvartoQuantization* call, int64_t* detail) {
  using namespace kvarto;
  const KvartoCache *residual = &call->residual, *cache = &call->cache;
  const int64_t *residual_blocks = call->residual_blocks, *blocks = call->blocks, num_blocks = call->num_blocks;
  for (int64_t i = 0; i < num_blocks; ++i)
    if (residual_blocks[i] < 0 || residual_blocks[i] >= residual->num_blocks || blocks[i] < 0 ||
        blocks[i] >= cache->num_blocks) {
      *detail = i;
      return KVARTO_BAD_QUANTIZED_BLOCK;
    }
  const int64_t row_bytes = residual->head_dim * element_size(residual->dtype), num_heads = residual->num_kv_heads;
  const int64_t head_bytes = residual->block_size * row_bytes, side_bytes = num_heads * head_bytes;
  const Quantizer quantize{*residual, find_isa(call->isa)->linear->to_float[residual->dtype],
                           int4_head(residual->block_size, residual->head_dim), row_bytes};
  const int64_t num_jobs = num_blocks * num_heads;
  const bool parallel = call->num_threads > 1 && num_jobs * head_bytes > 64 * 1024;
  parallel_jobs(parallel ? call->num_threads : 1, num_jobs, [&](int, int64_t job) {
    const int64_t i = job / num_heads, head = job % num_heads;
    const char* rows = (const char*)residual->data + head * head_bytes +
                       (residual_blocks[i] * residual->num_layers + call->residual_layer) * 2 * side_bytes;
    const int64_t out = (blocks[i] * cache->num_layers + call->layer) * num_heads + head;
    char* codes = (char*)cache->data + out * quantize.layout.bytes;
    quantize.keys(rows, codes);
    quantize.values(rows + side_bytes, codes);
  });
  return KVARTO_OK;
}
