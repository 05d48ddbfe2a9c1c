// Fetches a job's KV rows into the nearest cache some KB ahead of the arithmetic, and at its pace: in bursts they
// would fill what the processor has to keep track of its reads with, and the arithmetic's own would wait behind.
#pragma once

#include "attention_cache.h"

namespace kvarto {
namespace KVARTO_ISA {

class Ahead {
 public:
  // once: nobody reads these rows again soon, so they need not push anything out of the other caches.
  Ahead(const RowFinder& rows, Span span, int64_t heads, bool once)
      : rows_(rows),
        once_(once),
        run_(smaller(TILE, rows.block_size)),
        row_(span.begin / run_ * run_),
        end_(span.end),
        // Blocks that lie in one tile are fetched as they lie: the keys of all heads, scales and all, then the values.
        strips_(rows.block_size <= TILE ? 1 : heads),
        strip_bytes_(rows.block_size <= TILE ? heads * rows.head_bytes : TILE * rows.row_bytes),
        run_bytes_(2 * heads * run_ * (rows.head_bytes / rows.block_size)) {
    next_strip();
    // Small blocks are walked less in the order of the arithmetic, which has all keys of a tile before its values.
    use(rows.block_size < TILE ? 16384 : 8192);
    rest_ = 0;
  }

  // The arithmetic turns to these rows of a tile.
  void begin_tile(Span rows) {
    fetch(rest_);
    rest_ = (round_up(rows.end, run_) - rows.begin / run_ * run_) / run_ * run_bytes_;
  }

  // It is done with so many bytes. What it does not report is made up for when it turns to the next tile.
  KVARTO_MEMBER void use(int64_t bytes) {
    rest_ -= bytes;
    fetch(bytes);
  }

 private:
  static constexpr int64_t STEP = 256;

  KVARTO_MEMBER void fetch(int64_t bytes) {
    owed_ += bytes;
    while (owed_ >= STEP && at_) {
      for (int64_t line = 0; line < STEP; line += 64) once_ ? prefetch_once(at_ + line) : prefetch(at_ + line);
      owed_ -= smaller(STEP, stop_ - at_);
      at_ += STEP;
      if (at_ >= stop_) next_strip();
    }
  }

  void next_strip() {
    if (row_ >= end_) {
      at_ = nullptr;
      return;
    }
    const int64_t inside = side_ * rows_.value_bytes + strip_ * rows_.head_bytes;
    at_ = rows_.key(row_) + inside;
    stop_ = at_ + strip_bytes_;
    if (rows_.scaled && rows_.block_size > TILE) {
      const char* scales = rows_.key_scale(row_) + inside;
      prefetch(scales), prefetch(scales + 64);
      owed_ -= TILE * (int64_t)sizeof(float);
    }
    if (++strip_ < strips_) return;
    strip_ = 0;
    if (++side_ < 2) return;
    side_ = 0;
    row_ += run_;
  }

  const RowFinder& rows_;
  const bool once_;
  const int64_t run_;  // rows that are walked through before the next block, or tile
  int64_t row_, end_;
  const int64_t strips_, strip_bytes_, run_bytes_;
  int64_t side_ = 0, strip_ = 0;  // what comes next of the run at row_
  int64_t rest_ = 0;              // bytes of its tile that the arithmetic is not done with
  const char *at_ = nullptr, *stop_ = nullptr;
  // Bytes that it is done with and for which none were fetched. Apart from rest_: beside it GCC counts both in one
  // vector, and then waits for the halves that it wrote.
  int64_t owed_ = 0;
};

}  // namespace KVARTO_ISA
}  // namespace kvarto
