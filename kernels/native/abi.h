// What crosses the C ABI, and what the drivers (built once, no special flags) ask of the
// kernels (built once per instruction set). Plain data only: an inline function or template
// shared by both sides would be merged by the linker, perhaps into the AVX-512 copy.
#pragma once

#include <cstdint>

#define KVARTO_ABI_VERSION 13

// The first KVARTO_NUM_FLOATS are those of activations and weights; the rest, of codes in a cache, have scales.
enum KvartoDtype : int32_t {
  KVARTO_F32 = 0,
  KVARTO_BF16 = 1,
  KVARTO_F16 = 2,
  KVARTO_NUM_FLOATS = 3,
  KVARTO_I8 = 3,
  KVARTO_F8 = 4,  // E3M4, as in kernels/kv_layout.py
  KVARTO_I4 = 5,  // K and V of a head of a block in one, as in int4.h
  KVARTO_NUM_DTYPES = 6,
};

// What a weight may be beside a float: codes with scales, as in kernels/quantized_weight.py.
enum KvartoWeightCodes : int32_t {
  KVARTO_WEIGHT_INT8 = 8,
  KVARTO_WEIGHT_INT4 = 9,
};

enum KvartoStatus : int32_t {
  KVARTO_OK = 0,
  KVARTO_NO_MEMORY = 1,
  KVARTO_BAD_QUERY_START_LOC = 2,  // detail: the sequence whose entry decreases or ends outside
  KVARTO_BAD_KV_LEN = 3,           // detail: the sequence
  KVARTO_BAD_BLOCK_ID = 4,         // detail: the sequence
  KVARTO_BAD_SLOT = 5,             // detail: the token
  KVARTO_BAD_BLOCK_PAIR = 6,       // detail: the pair
  KVARTO_BAD_NUM_SCORED = 7,       // detail: the sequence, as in the rest
  KVARTO_BAD_NUM_KEPT = 8,
  KVARTO_BAD_KEPT_ROW = 9,
  KVARTO_BAD_SOURCE_BLOCK = 10,
  KVARTO_BAD_TARGET_BLOCK = 11,
  KVARTO_BAD_RESIDUAL_BLOCK = 12,  // detail: the sequence
  KVARTO_BAD_QUANTIZED_BLOCK = 13, // detail: the entry
  KVARTO_RANK_DIED = 14,           // detail: which; so in the next two
  KVARTO_RANK_LATE = 15,
  KVARTO_OTHER_COLLECTIVE = 16,
  KVARTO_EXCHANGE_ABORTED = 17,
  KVARTO_BAD_INDEX = 18,           // detail: the entry
};

// cache: [num_blocks, num_layers, 2, num_kv_heads, a head], contiguous. A head is [block_size, head_dim] of dtype and,
// where that is quantized, then [block_size] float32 scales. Int4: [num_blocks, num_layers, num_kv_heads, a head].
struct KvartoCache {
  void* data;
  int64_t num_blocks, num_layers, num_kv_heads, block_size, head_dim;
  int32_t dtype;
};

// query [num_tokens, num_heads, head_dim] of dtype, rows query_stride elements apart; out contiguous.
struct KvartoAttention {
  KvartoCache cache;
  const void* query;
  const void* far_query;  // what meets the keys of sinks behind the window
  const float* cos;       // [num_sinks, num_angles]: how their keys are turned back first; null: they are not
  const float* sin;
  void* out;
  const int32_t* block_tables;     // [num_seqs, max_blocks]
  const int32_t* query_start_loc;  // [num_seqs + 1]
  const int32_t* kv_lens;          // [num_seqs]
  KvartoCache residual;            // beside an int4 cache, dense, of dtype: the blocks that queries stand in
  const int32_t* residual_tables;  // [num_seqs, max_blocks]; null: the cache is not int4
  int64_t residual_layer;
  int64_t num_tokens, num_seqs, max_blocks, num_heads, query_stride, far_query_stride, num_angles, layer;
  int64_t window, num_sinks;  // no window: one wider than any sequence
  float scale, soft_cap;      // soft_cap 0: none
  int32_t dtype, isa, num_threads;
};

// Token t's K and V, [num_kv_heads, head_dim] of dtype, key_stride and value_stride elements apart, into a slot.
struct KvartoCacheWrite {
  KvartoCache cache;
  const void* key;
  const void* value;
  const int64_t* slot_mapping;  // [num_tokens]
  int64_t num_tokens, key_stride, value_stride, layer;
  int32_t dtype, isa, num_threads;
};

// Blocks of a layer of the residual, into those of an int4 cache.
struct KvartoQuantization {
  KvartoCache residual, cache;
  const int64_t* residual_blocks;  // [num_blocks]
  const int64_t* blocks;           // [num_blocks]
  int64_t num_blocks, residual_layer, layer;
  int32_t isa, num_threads;
};

// x [m, k] of x_dtype with rows x_stride elements apart; packed holds [n, k] of weight_dtype, which is a KvartoDtype or
// one of KvartoWeightCodes.
struct KvartoLinear {
  const void* x;
  const void* packed;
  const float* bias;  // [n] or null
  void* out;          // [m, n] of x_dtype, contiguous
  int64_t m, n, k, x_stride;
  int32_t x_dtype, weight_dtype, isa, num_threads;
};

// Blocks of block_bytes bytes, strides in bytes from one block to the next.
struct KvartoBlockCopy {
  const void* source;
  void* destination;
  const int64_t* pairs;  // [num_pairs, 2]: block of source, block of destination
  int64_t num_pairs, block_bytes;
  int64_t num_source_blocks, num_destination_blocks;
  int64_t source_stride, destination_stride;
  int32_t num_threads;
};

// Every op returns a KvartoStatus. `detail`: see there.
extern "C" {
int32_t kvarto_write_kv(const KvartoCacheWrite* call, int64_t* detail);
int32_t kvarto_quantize_blocks(const KvartoQuantization* call, int64_t* detail);
int32_t kvarto_paged_attention(const KvartoAttention* call, int64_t* detail);
int32_t kvarto_linear(const KvartoLinear* call, int64_t* detail);
int32_t kvarto_copy_blocks(const KvartoBlockCopy* call, int64_t* detail);
}

namespace kvarto {

// KV rows are folded in chunks of CHUNK rows and, inside a chunk, in tiles of TILE rows, both
// counted from row 0 of the sequence; before them the sinks behind the window, as a chunk of their own, and after them
// what is read from the residual, as another. A query's arithmetic therefore depends on nothing but the rows it sees.
constexpr int64_t CHUNK = 512;
constexpr int64_t TILE = 64;
// The least block_size: as many rows, counted from row 0, lie one behind another in one block.
constexpr int64_t RUN = 8;
constexpr int64_t MAX_HEAD_DIM = 256;
// Columns of a weight that are packed side by side.
constexpr int64_t PANEL = 32;
constexpr int64_t DIM_ALIGN = 32;
// A column of a query takes up to so many floats of scratch, however it is laid out.
constexpr int64_t QUERY_FLOATS = 2;
// A record is one query row's softmax state over a range of KV rows: first the max; from RECORD_SUM the sum of weights,
// spread over the lanes of a vector; from RECORD_HEAD the weighted sum of V.
constexpr int64_t RECORD_SUM = 16;
constexpr int64_t RECORD_HEAD = 32;

// Some consecutive queries of one sequence, all heads of some consecutive KV heads, over some chunks.
// Rows go KV head by KV head: row r of one is query r / group, head r % group of that KV head.
struct AttentionTile {
  const int32_t* block_table;
  int64_t first_token;    // row of query and out
  int64_t num_queries;
  int64_t first_visible;  // KV rows up to and with the first query's own; each later query has one more
  int64_t kv_head, num_kv_heads;
  bool sinks;             // the sinks behind the window too
  int64_t chunk_begin, chunk_end;
  float* partial;         // records [sinks + chunks + own, rows, record]; null: fold and write out
  const int32_t* residual_table;
  bool own;               // each query's own block, from the residual, too
  AttentionTile* whole = nullptr;  // of which this is a piece; who is done with the last one folds them and writes out
  int64_t num_left = 0;            // of a whole tile, its pieces that nobody is done with
  int64_t work = 0;                // about so many products of a query with a row, over the group
};

// Tiles for whoever is free; `next` only by atomic operations.
struct AttentionQueue {
  const AttentionTile* tiles;
  int64_t num_tiles, next;
};

struct AttentionKernels {
  // Works on the queue, as other threads do, until it is empty. By the cache's dtype.
  void (*attend[KVARTO_NUM_DTYPES])(const KvartoAttention&, AttentionQueue&, float* scratch);
};

// Columns of a row of x that share a scale where the weight is codes, as they do there.
constexpr int64_t CODE_GROUP = 32;

struct GroupScale {
  float scale;    // NaN where the group is not finite, as the sum
  float sum;      // of the numbers that its codes stand for
  int32_t start;  // -128 * the sum of its codes: where sums of products with codes begin whose zero is 128
};

// Rows of x as codes, k of each filled up with zeros to whole groups.
struct RowCodes {
  int8_t* codes;       // rows `stride` apart
  GroupScale* scales;  // rows num_groups apart
  int64_t stride, num_groups;
};

struct LinearKernels {
  int64_t width;  // float lanes: fixes how 16-bit columns interleave inside a panel
  void (*to_float[KVARTO_NUM_FLOATS])(const void* x, int64_t count, float* out);
  // One panel times x rows [m_begin, m_end); x is float32 with rows x_stride apart.
  void (*panel[KVARTO_NUM_FLOATS])(const KvartoLinear&, const void* x, int64_t x_stride, int64_t panel,
                                   int64_t m_begin, int64_t m_end, float* scratch);
  // The same of bf16 x and weights, which are multiplied as they are; null: this instruction set cannot.
  void (*bf16_panel)(const KvartoLinear&, const void* x, int64_t x_stride, int64_t panel, int64_t m_begin,
                     int64_t m_end, float* scratch);
};

// As above, of a weight that is codes.
struct QuantizedLinearKernels {
  // Row m of x from k float32, to which those up to whole groups are added.
  void (*to_codes)(float* x, int64_t k, const RowCodes& rows, int64_t m);
  // sums: [m_end - m_begin, PANEL].
  void (*int8_panel)(const KvartoLinear&, const RowCodes& rows, int64_t panel, int64_t m_begin, int64_t m_end,
                     float* sums);
  void (*int4_panel)(const KvartoLinear&, const RowCodes& rows, int64_t panel, int64_t m_begin, int64_t m_end,
                     float* sums);
};

// Whether two rows of a packed bf16 weight lie beside each other, column by column: what bf16_panel multiplies. Static: of
// an inline function the linker keeps one copy, which may be that of an instruction set that is not there.
static inline bool packs_row_pairs(const LinearKernels& kernels, int32_t weight_dtype, int64_t k) {
  return kernels.bf16_panel && weight_dtype == KVARTO_BF16 && k % 2 == 0;
}

}  // namespace kvarto
