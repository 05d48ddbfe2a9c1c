// Copies whole blocks between two pools, or within one.
#include <algorithm>
#include <cstring>

#include "isa.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace kvarto {
namespace {

constexpr int64_t LINE = 64;
constexpr int64_t CHUNK_BYTES = 512 * 1024;  // a thread's turn: less is not worth waking a thread for
constexpr int64_t STREAM_BYTES = 4 << 20;    // above which the copies would push everything else out of the caches

#if defined(__SSE2__)
// Past the caches: no line of the destination is read before it is written, a third of the traffic of plain stores.
void stream(char* out, const char* in, int64_t size) {
  const int64_t head = std::min<int64_t>(size, -(intptr_t)out & (LINE - 1)), body = (size - head) / LINE * LINE;
  memcpy(out, in, head);
  out += head, in += head;
  for (int64_t i = 0; i < body; i += LINE) {
    const __m128i* from = (const __m128i*)(in + i);
    __m128i* to = (__m128i*)(out + i);
    const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
    const __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
    _mm_stream_si128(to, a), _mm_stream_si128(to + 1, b);
    _mm_stream_si128(to + 2, c), _mm_stream_si128(to + 3, d);
  }
  memcpy(out + body, in + body, size - head - body);
}
void stream_fence() { _mm_sfence(); }
#else
void stream(char* out, const char* in, int64_t size) { memcpy(out, in, size); }
void stream_fence() {}
#endif

// Bytes [begin, end) of all copies laid end to end, so that threads share even a single block.
void copy_range(const KvartoBlockCopy& call, int64_t begin, int64_t end, bool streamed) {
  for (int64_t pair = begin / call.block_bytes; begin < end; ++pair) {
    const int64_t offset = begin - pair * call.block_bytes, size = std::min(call.block_bytes - offset, end - begin);
    const char* in = (const char*)call.source + call.pairs[2 * pair] * call.source_stride + offset;
    char* out = (char*)call.destination + call.pairs[2 * pair + 1] * call.destination_stride + offset;
    if (streamed)
      stream(out, in, size);
    else
      memcpy(out, in, size);
    begin += size;
  }
  if (streamed) stream_fence();
}

}  // namespace
}  // namespace kvarto

extern "C" int32_t kvarto_copy_blocks(const KvartoBlockCopy* call, int64_t* detail) {
  using namespace kvarto;
  for (int64_t pair = 0; pair < call->num_pairs; ++pair) {
    const int64_t from = call->pairs[2 * pair], to = call->pairs[2 * pair + 1];
    if (from < 0 || from >= call->num_source_blocks || to < 0 || to >= call->num_destination_blocks) {
      *detail = pair;
      return KVARTO_BAD_BLOCK_PAIR;
    }
  }
  const int64_t total = call->num_pairs * call->block_bytes, num_chunks = (total + CHUNK_BYTES - 1) / CHUNK_BYTES;
  const int threads = (int)std::max<int64_t>(1, std::min<int64_t>(call->num_threads, num_chunks));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk)
    copy_range(*call, chunk * CHUNK_BYTES, std::min(total, (chunk + 1) * CHUNK_BYTES), total >= STREAM_BYTES);
  return KVARTO_OK;
}
