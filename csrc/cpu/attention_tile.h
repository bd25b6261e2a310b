// The inner code of attention: a few query rows against one tile of 64 keys.
//
// A word is one element, or a pair of bfloat16 where the CPU multiplies pairs. A score is the sum
// of kLanes chains in ascending order; chain j multiplies and adds the words j, j + kLanes, ...
// This is what a dot product of vectors gives when its lanes are added in order, and a tile whose
// keys are transposed, one key a lane, gives the same bits without a step across lanes. Few rows
// take the first road (4 cycles a key and row on Zen 5), many the second (10 a key for the
// transpose, shared by all rows, and 2.5 a key and row).
#pragma once

#include "attention_words.h"
#include "task.h"

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
template <typename T>
constexpr int kScoreRows = kQuantized<T> ? 6 : 3;

// What work on a tile asks for of the next one (class Fetch): about a share for 8 cycles.
constexpr int kTransposeShares = 16;  // a vector of keys
template <typename T>
constexpr int kScoreShares = kScoreRows<T>;  // one word of kScoreRows rows
constexpr int kSoftenShares = 5;             // a row
constexpr int kValueShares = 1;              // a key and panel of kValueRows rows

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

// Asks memory for the keys, then the values of the next tile, a few lines at each step of the work
// on this one: asked all at once they would hold up the loads behind them, and memory would rest
// for the remainder of the tile.
class Fetch {
 public:
  template <typename T>
  Fetch(const Tile<T>& next, int64_t head_dim, int64_t num_shares) {
    const bool whole = next.key_bytes > 0;
    const int64_t row_bytes = head_dim * sizeof(T);
    stride_ = next.row_stride * sizeof(T);
    rows_ = whole ? 1 : kGroup;
    row_bytes_[0] = whole ? next.key_bytes : row_bytes;
    row_bytes_[1] = whole ? next.value_bytes : row_bytes;
    num_groups_ = ceil_div(next.num_keys, kGroup);
    for (int g = 0; g < num_groups_; ++g) {
      groups_[g] = reinterpret_cast<const char*>(next.keys[g]);
      groups_[num_groups_ + g] = reinterpret_cast<const char*>(next.values[g]);
    }
    const int64_t lines = ceil_div(row_bytes_[0], kLine) + ceil_div(row_bytes_[1], kLine);
    share_ = ceil_div(num_groups_ * rows_ * lines * kLine, num_shares);
    if (num_groups_ > 0) start_group();
  }

  void step(int64_t shares) {
    due_ += shares * share_;
    if (due_ < kLine || at_ == end_) return;
    const char* due = at_ + due_ / kLine * kLine;
    due_ %= kLine;
    for (due = due < end_ ? due : end_; at_ < due; at_ += kLine) __builtin_prefetch(at_);
    if (at_ >= end_) next_row();
  }

 private:
  static constexpr int64_t kLine = 64;
  void start_group() {
    row_ = 0;
    at_ = groups_[group_];
    end_ = at_ + row_bytes_[group_ >= num_groups_];
  }
  void next_row() {
    if (++row_ < rows_) {
      at_ = groups_[group_] + row_ * stride_;
      end_ = at_ + row_bytes_[group_ >= num_groups_];
    } else if (++group_ < 2 * num_groups_) {
      start_group();
    } else {
      at_ = end_;
    }
  }

  const char* groups_[2 * kGroups];
  int num_groups_ = 0, group_ = 0;
  const char *at_ = nullptr, *end_ = nullptr;
  int64_t stride_, rows_, row_bytes_[2], row_ = 0, share_, due_ = 0;
};

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
