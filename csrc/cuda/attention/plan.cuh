// How attention's work is cut. Keys: tiles of kTile, splits of kSplit, nodes of kNode splits, all
// at fixed positions of the sequence; rows: a query and a head of the group, 16 to a fragment. A
// row's splits are folded in ascending order within their node, then its nodes: the same sums
// whoever computes them, so cuts between blocks, batch and chunks reach no bit.
#pragma once

#include "cuda/attention/cache_layout.cuh"
#include "cuda/runtime/ptx.cuh"

namespace codellama_rt {
namespace cuda {

constexpr int kTile = 64;        // keys that share a softmax step: one page of the default size
constexpr int kSplit = 256;      // keys of a partial result: 128 KiB of bf16 keys and values
constexpr int kNode = 16;        // splits folded first: it halves the depth of the last fold
constexpr int kRows = 16;        // rows of a matrix fragment
constexpr int kFewQueries = 16;  // up to this many, a sequence is split among blocks
constexpr int kDim = 128;        // head_dim of the kernels by matrix instructions

// PagedAttentionParams and FlashAttentionParams in one: paged where block_tables is not null.
struct Attention {
  ptx::TensorMap key_map, value_map;  // of 16-bit caches, where the copy engine reads them
  const void *query, *key, *value;
  void* out;
  float* lse;
  const int32_t* cu_seqlens_q;
  const int32_t *block_tables, *seq_lens;  // paged
  const int32_t* cu_seqlens_k;             // contiguous
  float* partials;                         // rows of partial_floats; null: nothing is split
  int* tickets;
  int64_t max_partial_rows, max_tickets;
  int64_t max_blocks;  // paged
  int64_t num_keys;    // rows of the keys' matrix, of all pages and heads or contiguous
  int num_seqs, num_tokens, n_heads, n_kv_heads, block_size, box_rows;
  float scale_log2;  // scores are powers of 2: scale * log2(e)
  int few_queries;   // sequences with up to this many queries are split
  bool causal;
  bool few_too;    // the unsplit kernel looks whether it has to do what could not be split
  bool all_split;  // nothing is left for it
};

// Rows of partial results: O, then m and l.
constexpr int kPartialFloats = kDim + 4;

CLRT_DEVICE int group_size(const Attention& a) { return a.n_heads / a.n_kv_heads; }
CLRT_DEVICE int num_queries(const Attention& a, int seq) {
  return a.cu_seqlens_q[seq + 1] - a.cu_seqlens_q[seq];
}
CLRT_DEVICE int num_keys(const Attention& a, int seq) {
  return a.block_tables ? a.seq_lens[seq] : a.cu_seqlens_k[seq + 1] - a.cu_seqlens_k[seq];
}
CLRT_DEVICE int divide_up(int x, int y) { return (x + y - 1) / y; }

// The work of some rows of a key/value head over the keys [first_key, end_key).
struct Segment {
  int seq, kv_head, first_row, end_row, first_key, end_key;
};

// Keys that a row sees: it is query row / group of its sequence.
CLRT_DEVICE int visible_keys(const Attention& a, int seq, int row) {
  const int keys = num_keys(a, seq);
  if (!a.causal) return keys;
  const int visible = keys - num_queries(a, seq) + row / group_size(a) + 1;
  return visible < 0 ? 0 : visible;
}
// Row number over (num_tokens, n_heads).
CLRT_DEVICE int64_t output_row(const Attention& a, const Segment& s, int row) {
  const int group = group_size(a);
  return int64_t(a.cu_seqlens_q[s.seq] + row / group) * a.n_heads + s.kv_head * group + row % group;
}
// Row of the cache, over all pages and heads (paged), or of the keys' (num_keys, ...) matrix.
CLRT_DEVICE int64_t key_row(const Attention& a, int seq, int kv_head, int key) {
  if (!a.block_tables) return a.cu_seqlens_k[seq] + key;
  const int64_t page = a.block_tables[seq * a.max_blocks + key / a.block_size];
  return (page * a.n_kv_heads + kv_head) * a.block_size + key % a.block_size;
}

// What splitting makes of one sequence: groups of up to kRows rows a kv head, each over all splits.
struct Share {
  int groups, splits, rows;  // rows: of a group, at most

  CLRT_DEVICE int nodes() const { return divide_up(splits, kNode); }
  CLRT_DEVICE int units() const { return groups * splits; }
  CLRT_DEVICE int partial_rows() const { return groups * (splits + nodes()) * rows; }
  CLRT_DEVICE int tickets() const { return groups * (nodes() + 1); }
};

CLRT_DEVICE Share share_of(const Attention& a, int seq) {
  const int queries = num_queries(a, seq), rows = queries * group_size(a);
  if (queries == 0 || queries > a.few_queries) return {0, 0, 0};
  const int keys = num_keys(a, seq);
  return {a.n_kv_heads * divide_up(rows, kRows), keys == 0 ? 1 : divide_up(keys, kSplit),
          rows < kRows ? rows : kRows};
}

// All units (group, split) of all sequences in one list. Units before a sequence, and where its
// partial rows and tickets begin.
struct Totals {
  int units, partial_rows, tickets;

  CLRT_DEVICE void add(const Share& share) {
    units += share.units();
    partial_rows += share.partial_rows();
    tickets += share.tickets();
  }
  CLRT_DEVICE bool fit(const Attention& a) const {
    return a.partials && partial_rows <= a.max_partial_rows && tickets <= a.max_tickets;
  }
};

// Of the first `count` sequences, by the 32 lanes of a warp.
CLRT_DEVICE Totals totals_of(const Attention& a, int count) {
  Totals totals{0, 0, 0};
  for (int seq = threadIdx.x % kWarp; seq < count; seq += kWarp) totals.add(share_of(a, seq));
  for (int step = kWarp / 2; step > 0; step /= 2) {
    totals.units += __shfl_xor_sync(kAllLanes, totals.units, step);
    totals.partial_rows += __shfl_xor_sync(kAllLanes, totals.partial_rows, step);
    totals.tickets += __shfl_xor_sync(kAllLanes, totals.tickets, step);
  }
  return totals;
}

// Of `count` items in a row, item i taking places(i) places: the item that place number *at lies
// in, and *at becomes the place's number within it; past the end: count. By the 32 lanes of a warp,
// each with an item of its own; a serial search would cost every warp 10 us at 256 sequences.
template <typename Places>
CLRT_DEVICE int find_item(int count, const Places& places, int* at) {
  const int lane = threadIdx.x % kWarp;
  for (int first = 0; first < count; first += kWarp) {
    const int here = first + lane < count ? places(first + lane) : 0;
    int end = here;
    for (int step = 1; step < kWarp; step *= 2) {
      const int below = __shfl_up_sync(kAllLanes, end, step);
      if (lane >= step) end += below;
    }
    const unsigned beyond = __ballot_sync(kAllLanes, *at < end);
    if (beyond != 0) {
      const int found = __ffs(beyond) - 1;
      *at -= __shfl_sync(kAllLanes, end - here, found);
      return first + found;
    }
    *at -= __shfl_sync(kAllLanes, end, kWarp - 1);
  }
  return count;
}

// One unit after another of the list, from `unit` on, which a whole warp looks for.
class UnitCursor {
 public:
  UnitCursor() = default;
  CLRT_DEVICE UnitCursor(const Attention& a, int unit) : local_(unit) {
    seq_ = find_item(a.num_seqs, [&](int seq) { return share_of(a, seq).units(); }, &local_);
    before_ = totals_of(a, seq_);
    share_ = share_of(a, seq_);
  }

  CLRT_DEVICE void advance(const Attention& a) {
    ++local_;
    while (local_ >= share_.units()) {
      local_ -= share_.units();
      before_.add(share_);
      if (++seq_ >= a.num_seqs) return;  // past the end: nobody asks
      share_ = share_of(a, seq_);
    }
  }
  CLRT_DEVICE int group() const { return local_ / share_.splits; }
  CLRT_DEVICE int split() const { return local_ % share_.splits; }
  CLRT_DEVICE const Share& share() const { return share_; }
  CLRT_DEVICE Segment segment(const Attention& a) const {
    const int blocks = share_.groups / a.n_kv_heads, block = group() % blocks;
    const int rows = num_queries(a, seq_) * group_size(a), keys = num_keys(a, seq_);
    Segment s{seq_,
              group() / blocks,
              block * kRows,
              (block + 1) * kRows,
              split() * kSplit,
              (split() + 1) * kSplit};
    if (s.end_row > rows) s.end_row = rows;
    if (s.end_key > keys) s.end_key = keys;
    return s;
  }
  // Where the group's partial results begin: rows of its splits, then of its nodes.
  CLRT_DEVICE int partial_row(int index) const {
    return before_.partial_rows +
           (group() * (share_.splits + share_.nodes()) + index) * share_.rows;
  }
  // The counter of a node, or with node = nodes() that of the whole group.
  CLRT_DEVICE int ticket(int node) const {
    return before_.tickets + group() * (share_.nodes() + 1) + node;
  }

 private:
  int seq_, local_;
  Totals before_;
  Share share_;
};

// Worker number `worker` of `num_workers` takes the units [first, end).
struct Range {
  int first, end;
};
CLRT_DEVICE Range share_out(int64_t units, int worker, int num_workers) {
  return {int(units * worker / num_workers), int(units * (worker + 1) / num_workers)};
}

// The unsplit kernels' blocks: `rows` rows of a kv head each, the last ones first, for they see
// most. Returns false where there is no such block. By a whole warp.
CLRT_DEVICE bool find_block(const Attention& a, int block, int rows, Segment* s) {
  const bool few_too = a.few_too && !totals_of(a, a.num_seqs).fit(a);
  const auto blocks = [&](int seq) {
    const int queries = num_queries(a, seq);
    return queries <= a.few_queries && !few_too ? 0 : divide_up(queries * group_size(a), rows);
  };
  const int last = a.num_seqs - 1;
  const int item = find_item(a.num_seqs, [&](int i) { return blocks(last - i); }, &block);
  if (item == a.num_seqs) return false;
  s->seq = last - item;
  const int all = num_queries(a, s->seq) * group_size(a);
  s->first_row = (blocks(s->seq) - 1 - block) * rows;
  s->end_row = s->first_row + rows < all ? s->first_row + rows : all;
  s->first_key = 0;
  s->end_key = visible_keys(a, s->seq, s->end_row - 1);
  return true;
}
// As many blocks as there can be.
inline dim3 unsplit_grid(const Attention& a, int rows) {
  const int64_t group = a.n_heads / a.n_kv_heads;
  return dim3(a.num_tokens * group / rows + a.num_seqs, a.n_kv_heads);
}

}  // namespace cuda
}  // namespace codellama_rt
