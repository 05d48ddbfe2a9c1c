// Fetches a job's KV rows some KB ahead of the arithmetic, and at its pace: in bursts they would fill what the processor
// has to keep track of its reads with, and the arithmetic's own would wait behind. A processor drops prefetches for
// which it has no room just then, hence each row is asked for three times: what has come meanwhile costs little more.
// Once is enough where the arithmetic takes longer than the reads: of many query rows, and of codes.
#pragma once

#include "attention_rows.h"

namespace kvarto {
namespace KVARTO_ISA {

KVARTO_INLINE const AttentionTile* take(AttentionQueue& queue) {
  const int64_t next = __atomic_fetch_add(&queue.next, 1, __ATOMIC_RELAXED);
  return next < queue.num_tiles ? queue.tiles + next : nullptr;
}

// Takes a thread's tiles from the queue, each as soon as all rows of the one before have been asked for: a tile's first
// rows then come while the arithmetic is still at the last of another.
class Ahead {
 public:
  Ahead(const KvartoAttention& call, AttentionQueue& queue, int64_t element_bytes, bool scaled)
      : call_(call), queue_(queue), element_bytes_(element_bytes), rows_(call, {}, element_bytes, scaled) {
    take_tile();
    owed_ = FAR;
  }

  // What the arithmetic turns to next; null: there is no more.
  const AttentionTile* next_tile() {
    if (!taken_) take_tile();  // the arithmetic was quicker: what was left to fetch of its tile is no longer of use
    const AttentionTile* tile = taken_;
    taken_ = nullptr;
    if (!at_) take_tile();
    fetch(0);
    return tile;
  }

  // The arithmetic turns to these rows of a tile.
  void begin_tile(const Shape& shape, Span rows) {
    fetch(rest_);
    const int64_t run = run_rows(), row_bytes = 2 * shape.heads * (rows_.head_bytes / rows_.block_size);
    rest_ = (round_up(rows.end, run) - rows.begin / run * run) * row_bytes;
  }

  // It is done with so many bytes, or with the softmax of the scores that so many stand for. That takes a quarter of
  // the time or so, and a quarter of the reads are left to it: with none on their way, memory would idle meanwhile.
  // What is not reported is made up for when the arithmetic turns to the next tile.
  KVARTO_MEMBER void use(int64_t bytes) { advance(bytes * 3 / 4); }
  KVARTO_MEMBER void use_scores(int64_t bytes) { advance(bytes / 4); }

 private:
  // How far before the arithmetic rows are asked for, in bytes: into the second cache, into the first (those that are
  // asked for once, too), and once more.
  static constexpr int64_t FAR = 32768, NEAR = 16384, LAST = 6144;
  static constexpr int64_t STEP = 256, NUM_ASKED = FAR / STEP;

  // Rows that are walked through before the next block, or tile.
  int64_t run_rows() const { return smaller(TILE, rows_.block_size); }

  KVARTO_MEMBER void advance(int64_t bytes) {
    rest_ -= bytes;
    fetch(bytes);
  }

  KVARTO_MEMBER void fetch(int64_t bytes) {
    owed_ += bytes;
    for (; owed_ >= STEP; ++num_asked_) {
      const bool thrice = once_ && !rows_.scaled;
      once_ ? ask<prefetch_once>(asked(NEAR)) : ask<prefetch>(asked(NEAR));
      if (thrice) ask<prefetch_once>(asked(LAST));
      asked_[num_asked_ % NUM_ASKED] = at_;
      if (!at_) {
        owed_ -= STEP, idle_ += STEP;
        continue;
      }
      if (thrice) ask<prefetch_far>(at_);
      owed_ -= smaller(STEP, stop_ - at_);
      at_ += STEP;
      if (at_ >= stop_) next_strip();
    }
  }

  template <void (*PREFETCH)(const void*)>
  static KVARTO_MEMBER void ask(const char* rows) {
    if (!rows) return;
    for (int64_t line = 0; line < STEP; line += 64) PREFETCH(rows + line);
  }

  // The rows that are so many bytes before the arithmetic, if there are any.
  KVARTO_MEMBER const char* asked(int64_t before) const {
    return asked_[(num_asked_ - (FAR - before) / STEP) % NUM_ASKED];
  }

  // Takes no tile before the arithmetic has turned to the one taken before.
  void take_tile() {
    at_ = nullptr;
    if (taken_ || !(taken_ = take(queue_))) return;
    const Shape shape(call_, *taken_);
    once_ = few_rows(shape);
    rows_ = RowFinder(call_, *taken_, element_bytes_, rows_.scaled);
    // Of blocks that lie in one tile the keys of all heads, scales and all, are one run of bytes, and so are the values.
    strips_ = rows_.block_size <= TILE ? 1 : shape.heads;
    strip_bytes_ = rows_.block_size <= TILE ? shape.heads * rows_.head_bytes : TILE * rows_.row_bytes;
    const Span span = chunk_rows(*taken_, call_, shape);
    row_ = tile_row_ = span.begin / run_rows() * run_rows(), end_ = span.end;
    side_ = strip_ = 0;
    owed_ += idle_, idle_ = 0;
    next_strip();
  }

  void next_strip() {
    if (row_ >= end_) return take_tile();
    const int64_t inside = side_ * rows_.value_bytes + strip_ * rows_.head_bytes;
    at_ = rows_.key(row_) + inside;
    stop_ = at_ + strip_bytes_;
    if (rows_.scaled && rows_.block_size > TILE) {
      constexpr int64_t scale_bytes = TILE * sizeof(float);
      const char* scales = rows_.key_scale(row_) + inside;
      for (int64_t line = 0; line < scale_bytes; line += 64) prefetch(scales + line);
      owed_ -= scale_bytes;
    }
    if (++strip_ < strips_) return;
    strip_ = 0;
    row_ += run_rows();
    if (row_ < end_ && row_ % TILE) return;
    if (side_++ == 0)
      row_ = tile_row_;
    else
      side_ = 0, tile_row_ = row_;
  }

  const KvartoAttention& call_;
  AttentionQueue& queue_;
  const int64_t element_bytes_;
  // Of the last tile that was taken.
  RowFinder rows_;
  bool once_ = false;  // nobody reads its rows again soon, so they need not push anything out of the other caches
  int64_t row_ = 0, tile_row_ = 0, end_ = 0;
  int64_t strips_ = 0, strip_bytes_ = 0;
  int64_t side_ = 0, strip_ = 0;  // what comes next of the run at row_: keys of a whole tile, then its values
  const AttentionTile* taken_ = nullptr;  // null: the arithmetic has turned to it
  int64_t rest_ = 0;                      // bytes of its tile that the arithmetic is not done with
  const char *at_ = nullptr, *stop_ = nullptr;
  const char* asked_[NUM_ASKED] = {};
  uint64_t num_asked_ = 0;
  int64_t idle_ = 0;  // bytes that went by while there were no rows to ask for: of the next tile they are owed at once
  // Bytes that it is done with and for which none were fetched. Apart from rest_: beside it GCC counts both in one
  // vector, and then waits for the halves that it wrote.
  int64_t owed_ = 0;
};

}  // namespace KVARTO_ISA
}  // namespace kvarto
