// The two kernels of attention by mma.sync; attention.cu says which runs when.
//
// split    Each warp of a persistent grid takes an equal run of units (sequence, kv head, up to 16
//          rows, split of kSplit keys) and feeds itself; partial results go to the workspace, and
//          who completes a node, or a row's last node, folds it: no other launch, nobody waits.
// unsplit  A block of 4 warps takes 64 rows of a kv head and goes through all their keys.
#pragma once

#include "cuda/attention/ring.cuh"

namespace codellama_rt {
namespace cuda {

constexpr int kTeamWarps = 4, kTeamThreads = kTeamWarps * kWarp;
constexpr int kTeamRows = kTeamWarps * kRows;
constexpr float kLn2 = 0.693147180559945f;

// The query rows of a warp as first operands, and how far they see.
template <typename T, typename Tile>
struct WarpRows {
  uint32_t q[kDim / 16][4];
  int visible[2];  // keys that this lane's two rows see
  int most;        // keys that any row of the warp sees

  CLRT_DEVICE void load(const Attention& a, const Segment& s, int first) {
    const int end = first + kRows < s.end_row ? first + kRows : s.end_row;
    const T* rows[2];
    for (int i = 0; i < 2; ++i) {
      const int row = first + threadIdx.x % kWarp / 4 + 8 * i;
      visible[i] = row < end ? visible_keys(a, s.seq, row) : 0;
      rows[i] = row < end ? static_cast<const T*>(a.query) + output_row(a, s, row) * kDim : nullptr;
    }
    most = end > first ? visible_keys(a, s.seq, end - 1) : 0;
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const T* row = rows[i % 2];
        if (!row) {
          q[step][i] = 0;
          continue;
        }
        const auto pair =
            *reinterpret_cast<const Vector<T, 2>*>(row + Tile::query_element(step, i / 2));
        q[step][i] =
            pack<typename Tile::Math>(to_float(pair.elements[0]), to_float(pair.elements[1]));
      }
    }
  }
};

CLRT_DEVICE float final_value(float o, float l) {
  return l == 0 ? 0.0f : __fmul_rn(o, 1.0f / l);  // no keys; a sum of NaN stays one
}
CLRT_DEVICE float final_lse(float m, float l) {
  return l == 0 ? -INFINITY : __fmaf_rn(m, kLn2, logf(l));
}

// One tile for the rows of a warp; every thread of the team comes by.
template <typename T, typename Tile, typename Ring, typename Feed>
CLRT_DEVICE void attend_tile(const Attention& a, const Segment& s, int key, Ring& ring, Feed& feed,
                             const WarpRows<T, Tile>& rows, RowState& state) {
  const bool sees = rows.most > key;
  float scores[kGroups][4];
  unsigned char* stage = ring.take();
  if (sees) Tile::scores(stage, rows.q, scores);
  ring.give_back();
  feed.next(a);
  const int visible[2] = {rows.visible[0] - key, rows.visible[1] - key};
  if (sees) softmax(scores, visible, a.scale_log2, state);
  stage = ring.take();
  if (s.end_key - key < kTile) ring.clear_from(stage, s.end_key - key);
  if (sees) Tile::add_values(stage, scores, state.o);
  ring.give_back();
  feed.next(a);
}

// --- split ----------------------------------------------------------------------------------

struct UnitSource {
  UnitCursor cursor;
  int left;

  CLRT_DEVICE bool next(const Attention& a, Segment* s) {
    if (left == 0) return false;
    *s = cursor.segment(a);
    if (--left > 0) cursor.advance(a);
    return true;
  }
};

template <typename Tile>
CLRT_DEVICE void store_partial(const Attention& a, int64_t row, int num_rows,
                               const RowState& state) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = lane / 4 + 8 * half;
    if (r >= num_rows) continue;
    float* partial = a.partials + (row + r) * kPartialFloats;
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      partial[Tile::out_element(i, 0)] = state.o[i][2 * half];
      partial[Tile::out_element(i, 1)] = state.o[i][2 * half + 1];
    }
    if (lane % 4 == 0) {
      partial[kDim] = state.m[half];
      partial[kDim + 1] = state.l[half];
    }
  }
}

// Counts an arrival; true for the last of `count`, which leaves the counter at zero. What the
// others wrote before they arrived is visible to it.
CLRT_DEVICE bool arrives_last(int* ticket, int count) {
  __threadfence();
  __syncwarp();
  int before = 0;
  if (threadIdx.x % kWarp == 0) before = atomicAdd(ticket, 1);
  before = __shfl_sync(kAllLanes, before, 0);
  if (before != count - 1) return false;
  if (threadIdx.x % kWarp == 0) *ticket = 0;
  __syncwarp();
  __threadfence();
  return true;
}

// A row of a partial result, spread over a warp.
struct SpreadRow {
  static constexpr int kEach = kDim / kWarp;
  float o[kEach];
  float m, l;

  CLRT_DEVICE void load(const float* partial) {
    for (int i = 0; i < kEach; ++i) {
      o[i] = __ldcg(partial + threadIdx.x % kWarp * kEach + i);
    }
    m = __ldcg(partial + kDim);
    l = __ldcg(partial + kDim + 1);
  }
};

// Folds `count` partial results, num_rows apart, of row number `row`.
CLRT_DEVICE SpreadRow fold_partials(const Attention& a, int64_t row, int count, int num_rows) {
  constexpr int kAhead = 8;  // loads in flight
  SpreadRow total{};
  total.m = -INFINITY;
  const float* partial = a.partials + row * kPartialFloats;
  const int64_t step = int64_t(num_rows) * kPartialFloats;
  for (int first = 0; first < count; first += kAhead) {
    SpreadRow parts[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i < count) parts[i].load(partial + (first + i) * step);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (first + i >= count) break;
      const FoldScales scales = fold_scales(total.m, total.l, parts[i].m, parts[i].l);
      for (int j = 0; j < SpreadRow::kEach; ++j) {
        total.o[j] = scales(total.o[j], parts[i].o[j]);
      }
    }
  }
  return total;
}

template <typename T>
CLRT_DEVICE void store_spread(const Attention& a, int64_t row, const SpreadRow& state) {
  constexpr int kEach = SpreadRow::kEach;
  const int lane = threadIdx.x % kWarp;
  Vector<T, kEach> out;
  for (int i = 0; i < kEach; ++i) {
    out.elements[i] = from_float<T>(final_value(state.o[i], state.l));
  }
  *reinterpret_cast<Vector<T, kEach>*>(static_cast<T*>(a.out) + row * kDim + lane * kEach) = out;
  if (lane == 0) a.lse[row] = final_lse(state.m, state.l);
}

// A unit's partial result is stored: fold what is now complete.
template <typename T>
CLRT_DEVICE void finish_unit(const Attention& a, const UnitCursor& unit, const Segment& s) {
  const int splits = unit.share().splits, nodes = unit.share().nodes();
  const int node = unit.split() / kNode, first = node * kNode, rows = unit.share().rows;
  const int in_node = splits - first < kNode ? splits - first : kNode;
  if (!arrives_last(a.tickets + unit.ticket(node), in_node)) return;
  for (int r = 0; r < s.end_row - s.first_row; ++r) {
    const auto state = fold_partials(a, unit.partial_row(first) + r, in_node, rows);
    if (nodes == 1) {
      store_spread<T>(a, output_row(a, s, s.first_row + r), state);
      continue;
    }
    float* partial = a.partials + (unit.partial_row(splits + node) + r) * kPartialFloats;
    const int lane = threadIdx.x % kWarp;
    for (int i = 0; i < SpreadRow::kEach; ++i) {
      partial[lane * SpreadRow::kEach + i] = state.o[i];
    }
    if (lane == 0) {
      partial[kDim] = state.m;
      partial[kDim + 1] = state.l;
    }
  }
  if (nodes == 1 || !arrives_last(a.tickets + unit.ticket(nodes), nodes)) return;
  for (int r = 0; r < s.end_row - s.first_row; ++r) {
    const auto state = fold_partials(a, unit.partial_row(splits) + r, nodes, rows);
    store_spread<T>(a, output_row(a, s, s.first_row + r), state);
  }
}

template <typename T, typename Tile, bool kBulk>
CLRT_DEVICE void attend_split(const Attention& a) {
  using WarpRing = Ring<Tile, kBulk, 1>;
  const Totals totals = totals_of(a, a.num_seqs);
  if (!totals.fit(a)) return;
  const int warp = threadIdx.x / kWarp, num_warps = blockDim.x / kWarp;
  // Neighbouring runs go to different SMs: a short batch then uses all of them.
  const Range range = share_out(totals.units, warp * gridDim.x + blockIdx.x, num_warps * gridDim.x);
  if (range.first == range.end) return;
  WarpRing ring(shared_memory() + warp * WarpRing::kBytes);
  static_assert(sizeof(UnitCursor) <= WarpRing::kUnitBytes, "no room for a unit");
  UnitCursor& unit = *static_cast<UnitCursor*>(ring.unit_memory());
  const UnitCursor first(a, range.first);
  if (ring.leads()) unit = first;
  Feed<WarpRing, UnitSource, kBulk> feed(a, ring, UnitSource{first, range.end - range.first},
                                         Tile::kStages);
  for (int i = range.first;;) {
    const Segment s = unit.segment(a);
    WarpRows<T, Tile> rows;
    rows.load(a, s, s.first_row);
    RowState state;
    state.clear();
    for (int key = s.first_key; key < s.end_key; key += kTile) {
      attend_tile<T, Tile>(a, s, key, ring, feed, rows, state);
    }
    state.complete();
    store_partial<Tile>(a, unit.partial_row(unit.split()), s.end_row - s.first_row, state);
    finish_unit<T>(a, unit, s);
    if (++i == range.end) return;
    WarpRing::sync();
    if (ring.leads()) unit.advance(a);
    WarpRing::sync();
  }
}

// --- unsplit --------------------------------------------------------------------------------

struct OneSegment {
  Segment segment;
  bool given = false;

  CLRT_DEVICE bool next(const Attention&, Segment* s) {
    *s = segment;
    const bool first = !given;
    given = true;
    return first;
  }
};

// The nodes' fold of rows with more than one node, in shared memory: it is touched every 4,096
// keys.
template <int kThreads>
struct SharedTotal {
  static constexpr int kFloats = kDim / 8 * 4 + 4;
  float* memory;  // kFloats a thread, a stride of the block apart

  CLRT_DEVICE float& at(int i) const { return memory[i * kThreads + threadIdx.x]; }
  CLRT_DEVICE void clear() const {
    for (int i = 0; i < kFloats; ++i) at(i) = i < kFloats - 4 ? 0 : i < kFloats - 2 ? -INFINITY : 0;
  }
  CLRT_DEVICE void add(const RowState& node) const {
    for (int row = 0; row < 2; ++row) {
      float m = at(kFloats - 4 + row), l = at(kFloats - 2 + row);
      const FoldScales scales = fold_scales(m, l, node.m[row], node.l[row]);
      at(kFloats - 4 + row) = m;
      at(kFloats - 2 + row) = l;
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        for (int j = 2 * row; j < 2 * row + 2; ++j) {
          at(4 * i + j) = scales(at(4 * i + j), node.o[i][j]);
        }
      }
    }
  }
  CLRT_DEVICE void read(RowState& state) const {
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      for (int j = 0; j < 4; ++j) state.o[i][j] = at(4 * i + j);
    }
    for (int row = 0; row < 2; ++row) {
      state.m[row] = at(kFloats - 4 + row);
      state.l[row] = at(kFloats - 2 + row);
    }
  }
};

template <typename T, typename Tile>
CLRT_DEVICE void store_rows(const Attention& a, const Segment& s, int first,
                            const RowState& state) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = first + lane / 4 + 8 * half;
    if (row >= s.end_row) continue;
    const int64_t at = output_row(a, s, row);
    T* out = static_cast<T*>(a.out) + at * kDim;
    const float l = state.l[half];
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        out[Tile::out_element(i, j)] = from_float<T>(final_value(state.o[i][2 * half + j], l));
      }
    }
    if (lane % 4 == 0) a.lse[at] = final_lse(state.m[half], l);
  }
}

template <typename T, typename Tile, bool kBulk>
CLRT_DEVICE void attend_unsplit(const Attention& a) {
  using TeamRing = Ring<Tile, kBulk, kTeamWarps>;
  OneSegment source{};
  if (!find_block(a, blockIdx.x, kTeamRows, &source.segment)) return;
  source.segment.kv_head = blockIdx.y;
  TeamRing ring(shared_memory());
  const SharedTotal<kTeamThreads> total{
      reinterpret_cast<float*>(shared_memory() + TeamRing::kBytes)};
  Segment& s = *reinterpret_cast<Segment*>(total.memory + total.kFloats * kTeamThreads);
  if (threadIdx.x == 0) s = source.segment;  // registers are short
  __syncthreads();
  const auto one_node = [&] { return s.end_key <= kSplit * kNode; };
  if (!one_node()) total.clear();
  WarpRows<T, Tile> rows;
  rows.load(a, s, s.first_row + threadIdx.x / kWarp * kRows);
  RowState state, node;
  state.clear();
  node.clear();
  Feed<TeamRing, OneSegment, kBulk> feed(a, ring, source, Tile::kStages);
  for (int key = 0; key < s.end_key;) {
    attend_tile<T, Tile>(a, s, key, ring, feed, rows, state);
    key += kTile;
    const bool last = key >= s.end_key;
    if (key % kSplit != 0 && !last) continue;
    state.complete();
    fold(node, state);
    state.clear();
    if (one_node() || (key % (kSplit * kNode) != 0 && !last)) continue;
    total.add(node);
    node.clear();
  }
  if (!one_node()) total.read(node);
  store_rows<T, Tile>(a, s, s.first_row + threadIdx.x / kWarp * kRows, node);
}

}  // namespace cuda
}  // namespace codellama_rt
