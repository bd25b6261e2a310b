// The inner code of attention: a few query rows against one tile of 64 keys.
//
// A word is one element, or a pair of bfloat16 where the CPU multiplies pairs. A score is the sum
// of kLanes chains; chain j multiplies and adds the words j, j + kLanes, ... Chains are added in
// one tree: those whose numbers differ by a multiple of 4 first, then 0 and 2, 1 and 3, then both.
// So one row may multiply a key's words as they lie, and many rows share a vector: of a few words
// of some rows, times those words of a key again and again, which takes no step across lanes.
#pragma once

#include "cpu/attention/qk.h"
#include "cpu/runtime/task.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int kTile = 64;  // keys of one softmax step; a tile starts at a multiple of it
constexpr int kGroups = kTile / kGroup;
// Elements that one of T holds.
template <typename T>
constexpr int64_t kPacked = std::is_same_v<T, Nibbles> ? 2 : 1;
// Whether values come as two vectors of every other element (load_values).
template <typename T>
constexpr bool kLoadsPairs =
    std::is_same_v<T, Nibbles> || (std::is_same_v<T, bf16> && kLanes == 16);

// Rows and vectors multiplied at a time: what fits 32 (AVX2: 16) registers. Values and exact scores
// take one accumulator for each pair, other scores two.
constexpr int kPanel = kLanes == 16 ? 4 : 2;
constexpr int kValueRows = kLanes == 16 ? 8 : 4;
// Vectors of values: fewer for many rows, that each is converted once for all of them.
constexpr int value_panel(int64_t rows) { return rows == 1 ? 2 * kPanel : rows <= 4 ? kPanel : 2; }

constexpr int kSoftmaxShares = 5;  // what work on a row asks memory for, next to a key and panel of
                                   // kValueRows rows: about as long

// Where the tile's groups lie. Groups past the last key stand for the last one again.
template <typename T>
struct Tile {
  const T* keys[kGroups];
  const T* values[kGroups];
  int64_t row_stride;              // in T
  int64_t key_bytes, value_bytes;  // of a group in one piece, its scales included; 0: rows apart
  int num_keys;                    // the keys that exist: in (0, kTile]
};

// ---- keys and values of a tile ------------------------------------------------------------

// Asks memory for a tile's keys or values, a few lines at each step of the work on others: asked
// all at once they would hold up the loads behind them, and memory would rest for the remainder.
// Into L2, as a tile of bfloat16 fills an L1 of 32 KB: 8 rows of 32,768 keys (7B) take 24 ms so and
// 31 into L1, one row 16 to 18 and 18 (Zen 4).
class Fetch {
 public:
  // group_bytes: 0 where rows of row_bytes lie `stride` bytes apart.
  template <typename T>
  Fetch(const T* const (&groups)[kGroups], int num_keys, int64_t group_bytes, int64_t row_bytes,
        int64_t stride, int64_t num_steps)
      : groups_(reinterpret_cast<const char* const*>(groups)),
        end_group_(groups_ + ceil_div(num_keys, kGroup)),
        rows_(group_bytes > 0 ? 1 : kGroup),
        row_bytes_(group_bytes > 0 ? group_bytes : row_bytes),
        stride_(stride) {
    const int64_t lines = (end_group_ - groups_) * rows_ * ceil_div(row_bytes_, kLine);
    share_ = ceil_div(lines * kLine, num_steps);
    if (lines > 0) start_row();
  }

  void step(int64_t steps) {
    due_ += steps * share_;
    if (due_ < kLine || at_ == end_) return;
    const char* due = at_ + due_ / kLine * kLine;
    due_ %= kLine;
    for (due = due < end_ ? due : end_; at_ < due; at_ += kLine) __builtin_prefetch(at_, 0, 2);
    if (at_ >= end_) next_row();
  }

 private:
  static constexpr int64_t kLine = 64;
  void start_row() {
    at_ = *groups_ + row_ * stride_;
    end_ = at_ + row_bytes_;
  }
  void next_row() {
    if (++row_ == rows_) {
      row_ = 0;
      ++groups_;
    }
    if (groups_ < end_group_) {
      start_row();
    } else {
      at_ = end_;
    }
  }

  const char *const *groups_, *const *end_group_;
  int64_t rows_, row_bytes_, stride_, row_ = 0, share_, due_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
};

template <typename T>
Fetch fetch_keys(const Tile<T>& tile, int64_t head_dim, int64_t num_steps) {
  return Fetch(tile.keys, tile.num_keys, tile.key_bytes, head_dim * sizeof(T),
               tile.row_stride * sizeof(T), num_steps);
}
template <typename T>
Fetch fetch_values(const Tile<T>& tile, int64_t head_dim, int64_t num_steps) {
  return Fetch(tile.values, tile.num_keys, tile.value_bytes, head_dim * sizeof(T),
               tile.row_stride * sizeof(T), num_steps);
}

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
