// linear over quantised weights: out[t, n] = sum over k of x[t, k] * weight[n, k]
// Shapes   x (num_tokens, k), weights (n[i], k) in one format, out (num_tokens, sum(n))
// Traffic  the weights' bytes once for every kMaxTokens tokens
// Limit    memory read to about 5 tokens, then the two pipes that VPDPBUSD shares with multiplying.
//          64 elements of k take, of each token and vector of 16 rows, 16 VPDPBUSD, a product of
//          scales and an FMA over int8 (16 and 5 FMA over int4): on AMD EPYC (Zen 4), where each
//          takes one of two pipes, at most 16/18 = 89 % of the rate of VPDPBUSD alone (int4: 16/21
//          = 76 %). A loop over operands in L1 reaches 88 % (76 %). Over int4 in place each panel
//          multiplies scales and minima by their units as well: at most 73 % at 4 tokens, 74 % at 8
//          and 16 (in L1 71 and 73). Two cores there, 942 GOP/s and 60 GB/s: 90 to 93 % of memory's
//          rate at 1 token, 75 % (67 %) of VPDPBUSD at 16, 79 % (70 %) at 512, of whose time
//          3 % go into quantising x, unpacking and writing results. Of a GGUF block's time at 1
//          token two thirds go into transposing it
// Tiling   activations are quantised once, in panels of tokens. A task takes blocks of tiles of 16
//          rows, and of a block chunks of groups along k: few enough to stay in L1 until all panels
//          have passed, of which each fetches a part of the next chunk. GGUF's blocks are unpacked
//          into such a chunk, and so is int4 for many tokens; else own formats are read in place. A
//          panel is multiplied by one or two vectors of rows at a time, all sums in registers; a
//          lane is a row, so nothing is ever summed across lanes
// Numerics x is quantised per token and group of the weight along k (over int4 per two groups; over
//          int8 rotated first): scale = max|x| / 127 in float32,
//          value = x * (127 / max) rounded to nearest even. A group's dot product is an exact
//          integer; then, in ascending order of the groups, for each of its scales,
//            sum = fma(float(dot), x_scale * weight_scale, sum)
//          and, in formats that have one, sum = fma(minimum, x_scale * sum(values), sum). Over
//          int4 a sum of two groups is made like that without x_scale, from 0, and then added:
//            sum = fma(sum of two groups, x_scale, sum)
//          No choice of tile, chunk, task or instruction set touches that (but where there is no
//          fma it rounds twice). A NaN or an infinity in x makes its token's results NaN
#include "cpu/linear/quantized.h"

#include <algorithm>

#include "cpu/linear/fused.h"
#include "cpu/linear/widened.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// How much is multiplied at a time: a panel of tokens by vectors of rows with all sums in
// registers, by a chunk of k of a few tiles, which stays in L1 until all panels have passed.
constexpr bool kManyRegisters = kLanes == 16;  // 32, of AVX-512
// 12 integer and 12 float sums, 2 weights and 1 activation in registers; where groups share a
// scale, 8 integer sums, 8 float sums of such groups and 8 of all.
template <typename Layout>
struct Many {
  static constexpr bool kShared = Layout::kShared > 1;
  static constexpr int kTokens = !kManyRegisters ? 2 : kShared ? 8 : 6;
  static constexpr int kVectors = kManyRegisters && kShared ? 1 : 2;
  static constexpr int kInL1 = 2 * kParts;            // vectors
  static constexpr int64_t kTiles = 4, kChunk = 512;  // 17 KB of 32 rows
};
struct Few {  // a tile at a time: one stream from memory. 10 and 12 tokens were 20 % slower than 8
  static constexpr int kTokens = kManyRegisters ? 8 : 2, kVectors = kManyRegisters ? 1 : 2;
  static constexpr int kInL1 = kVectors;
  static constexpr int64_t kTiles = 1, kChunk = 512;
};
constexpr int64_t kFewTokens = 4 * Few::kTokens;
constexpr int64_t kMaxTokens = 516;  // 86 panels; bounds the scratch memory, not the result
constexpr int64_t kTasks = 64;       // with many tokens
constexpr int64_t kCacheLine = 64;
// Fewer elements of x are packed by the caller: 12 us over int8, 6 over int4. More would let the
// other threads fall asleep: 16 tokens of 4096, 50 us over int8, made a product of 770 us take 870.
constexpr int64_t kPackedByAll = 16 << 10;
// Up to so many tokens a row is one chunk, and what lies some way ahead is fetched: kAhead bytes
// into L1 where memory is the limit, else twice as many into L2. With more tokens the next chunk is
// fetched into L2 meanwhile: into L1, 8 and 16 tokens took 1.8 and 2.2 ms over int8, not 1.4 and
// 1.9, for loads waited for room in its queue of misses.
constexpr int64_t kStreamTokens = smaller(5, Few::kTokens);
constexpr int64_t kAhead = 4096;

// Whether memory is the limit of so many tokens, by their products with a byte of weights. AMD EPYC
// (Zen 4), two cores that read 60 GB/s, (11008, 4096), into L1 -> into L2: int4, 1 token 444 -> 565
// us, 3 686 -> 544, 4 780 -> 677, 5 892 -> 802; int8, 4 tokens 968 -> 1146, 5 1073 -> 1004.
template <typename Layout>
constexpr bool memory_is_the_limit(int64_t tokens) {
  return 2 * tokens * Layout::kGroup * kWeightTile < 9 * Layout::kBytes;
}

// ---- activations: (chunk of groups, panel of tokens, group, token) --------------------------

template <typename Layout>
using TokensOf = TokenGroup<Layout::kGroup>;

// Tokens dealt evenly to as few panels as there can be: 9 are 5 and 4, not 8 and 1.
struct Panels {
  int64_t num_tokens, most;
  int64_t count() const { return ceil_div(num_tokens, most); }
  int64_t first(int64_t panel) const { return panel * num_tokens / count(); }
  int64_t of(int64_t token) const { return ((token + 1) * count() - 1) / num_tokens; }
};

template <typename Layout, typename X>
void pack_token(const LinearParams& p, int64_t chunk, Panels panels, int64_t token,
                TokensOf<Layout>* x) {
  const X* row = static_cast<const X*>(p.x) + token * p.x_stride;
  const int64_t groups = num_groups<Layout>(p.k), panel = panels.of(token);
  const int64_t t = panels.first(panel), height = panels.first(panel + 1) - t;
  for (int64_t first = 0; first < groups; first += chunk) {
    const int64_t length = smaller(chunk, groups - first);
    TokensOf<Layout>* to = x + first * p.num_tokens + t * length + token - t;
    constexpr int64_t kElements = Layout::kShared * Layout::kGroup;
    for (int64_t g = 0; g < length; g += Layout::kShared) {
      const int64_t k = (first + g) * Layout::kGroup;
      quantize_groups<Layout>(row + k, smaller(kElements, p.k - k), to + g * height, height);
    }
  }
}

template <typename Layout>
void pack_all(const LinearParams& p, int64_t chunk, Panels panels, TokensOf<Layout>* x) {
  const auto pack = [&](int64_t token) {
    with_type(p.x_dtype,
              [&](auto type) { pack_token<Layout, decltype(type)>(p, chunk, panels, token, x); });
  };
  if (p.num_tokens * p.k >= kPackedByAll) return for_each_task(p.num_tokens, pack);
  for (int64_t token = 0; token < p.num_tokens; ++token) pack(token);
}

// ---- the inner loop ------------------------------------------------------------------------

// One vector of rows: a part of a tile's groups, and what to prefetch meanwhile.
struct RowVector {
  const uint8_t *head, *groups, *next;
  int part;
};

// sums[t][j] += the products of a group by its scales, and by those of x if each group has its own.
template <typename Layout, int kTokens, int kVectors>
__attribute__((always_inline)) inline void multiply_group(const TokensOf<Layout>* x,
                                                          const RowVector* rows,
                                                          const uint8_t* const (&group)[kVectors],
                                                          const int (&part)[kVectors],
                                                          Vec (&sums)[kTokens][kVectors]) {
  constexpr int kHalfQuads = Layout::kGroup / 4 / Layout::kHalves;
  // One sum would wait for its own last product: 4 to 5 cycles.
  constexpr int kChains = kTokens * kVectors < 4 ? 2 : 1;
#pragma GCC unroll 2
  for (int half = 0; half < Layout::kHalves; ++half) {
    Ints dots[kChains][kTokens][kVectors];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        dots[0][t][j] = splat_int(Layout::kBias == 0 ? 0 : x[t].start[half]);
        if (kChains > 1) dots[kChains - 1][t][j] = splat_int(0);
      }
    }
#pragma GCC unroll 16
    for (int q = half * kHalfQuads; q < (half + 1) * kHalfQuads; ++q) {
      Bytes w[kVectors];
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) w[j] = Layout::values(group[j], q, part[j]);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        Ints(&sum)[kVectors] = dots[q % kChains][t];
        if constexpr (kVectors == 1) {
          sum[0] = dot_at(w[0], x[t].values + 4 * q, sum[0]);
        } else {
          const Quad quad = load_quad(x[t].values + 4 * q);
#pragma GCC unroll 2
          for (int j = 0; j < kVectors; ++j) sum[j] = dot(w[j], quad, sum[j]);
        }
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      const Vec scales = Layout::scales(rows[j].head, group[j], half, part[j]);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        const Ints& sum = dots[0][t][j];
        const Vec product = to_vec(kChains > 1 ? sum + dots[kChains - 1][t][j] : sum);
        const Vec factor = Layout::kShared > 1 ? scales : splat(x[t].scale) * scales;
        sums[t][j] = fma(product, factor, sums[t][j]);
      }
    }
  }
#pragma GCC unroll 2
  for (int j = 0; j < kVectors && Layout::kHasMinimum; ++j) {
    const Vec minima = Layout::minima(rows[j].head, group[j], part[j]);
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) {
      sums[t][j] = fma(minima, splat(x[t].minimum_factor), sums[t][j]);
    }
  }
}

// totals[t][j] += the products of `groups` groups; tokens kTokens apart in x, rows of totals
// `stride` apart. Moves each vector's `next` on by `ahead` bytes for each group, and prefetches
// them.
template <typename Layout, int kTokens, int kVectors>
__attribute__((noinline)) void multiply_groups(const TokensOf<Layout>* x, RowVector* rows,
                                               int64_t groups, int64_t ahead, float* totals,
                                               int64_t stride) {
  constexpr bool kShared = Layout::kShared > 1;
  constexpr bool kIntoL1 = kTokens <= kStreamTokens && memory_is_the_limit<Layout>(kTokens);
  const uint8_t *group[kVectors], *next[kVectors];
  int part[kVectors];
  Vec sums[kTokens][kVectors];
#pragma GCC unroll 2
  for (int j = 0; j < kVectors; ++j) {
    group[j] = rows[j].groups;
    next[j] = rows[j].next;
    part[j] = kParts == 1 ? 0 : rows[j].part;
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) sums[t][j] = load(totals + t * stride + j * kLanes);
  }
  while (groups > 0) {
    const int64_t end = kShared ? groups - smaller(groups, Layout::kShared) : 0;
    Vec shared[kTokens][kVectors] = {};  // of groups with one scale of x
    for (; groups > end; --groups, x += kTokens) {
      multiply_group<Layout>(x, rows, group, part, kShared ? shared : sums);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        for (int64_t i = 0; i < ahead; i += kCacheLine) {
          __builtin_prefetch(next[j] + i, 0, kIntoL1 ? 3 : 2);
        }
        next[j] += ahead;
        group[j] += Layout::kBytes;
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kTokens && kShared; ++t) {
      const Vec scale = splat((x - kTokens)[t].scale);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) sums[t][j] = fma(shared[t][j], scale, sums[t][j]);
    }
  }
#pragma GCC unroll 2
  for (int j = 0; j < kVectors; ++j) {
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t) store(totals + t * stride + j * kLanes, sums[t][j]);
    rows[j].next = next[j];
  }
}

template <int n>
struct Count {
  static constexpr int value = n;
};
template <int kMost, typename F>
inline void with_count(int64_t count, const F& f) {
  if (count == kMost) {
    f(Count<kMost>{});
  } else if constexpr (kMost > 1) {
    with_count<kMost - 1>(count, f);
  }
}

// ---- tiles and where they lie --------------------------------------------------------------

struct PlacedTile : Tile {
  int64_t column;  // of out
};

inline PlacedTile find_tile(const LinearParams& p, int64_t tile) {
  int64_t column = 0, i = 0;
  for (int64_t tiles; tile >= (tiles = ceil_div(p.n[i], kWeightTile)); tile -= tiles) {
    column += p.n[i++];
  }
  const int64_t row = tile * kWeightTile;
  return {{static_cast<const uint8_t*>(p.weights[i]), row, smaller(kWeightTile, p.n[i] - row)},
          column + row};
}

// A token's tiles together: rows of `out` lie pages apart. `gates`: as totals, what gates them, or
// null. Changes totals.
inline void put_tiles(const FusedLinearParams& p, const PlacedTile* tiles, int64_t count,
                      float* totals, const float* gates, int64_t stride) {
  with_type(p.out_dtype, [&](auto out_type) {
    using T = decltype(out_type);
    for (int64_t t = 0; t < p.num_tokens; ++t) {
      T* out = static_cast<T*>(p.out) + t * p.out_stride;
      float* total = totals + t * stride;
      for (int64_t i = 0; gates && i < count * kWeightTile; i += kLanes) {
        store(total + i, silu(load(gates + t * stride + i)) * load(total + i));
      }
      for (int64_t i = 0; i < count; ++i, total += kWeightTile) {
        if (p.addend)
          add(p.addend + t * p.addend_stride + tiles[i].column, tiles[i].num_rows, total);
        convert(total, out + tiles[i].column, tiles[i].num_rows);
      }
    }
  });
}

// ---- blocks of tiles -----------------------------------------------------------------------

// All tokens by one chunk of a block's tiles: a few vectors of rows stay in L1, the panels pass.
// Each fetches its share of what comes next, of which a group's part is group_bytes.
template <typename Layout, typename Shape>
void multiply_chunk(const TokensOf<Layout>* x, Panels panels, int64_t groups, int64_t group_bytes,
                    RowVector* rows, int64_t num_vectors, float* totals, int64_t stride) {
  const int64_t ahead = ceil_div(group_bytes, panels.count());
  for (int64_t first = 0; first < num_vectors; first += Shape::kInL1) {
    const int64_t end = smaller(num_vectors, first + Shape::kInL1);
    for (int64_t i = 0; i < panels.count(); ++i) {
      const int64_t t = panels.first(i), height = panels.first(i + 1) - t;
      for (int64_t j = first; j < end; j += Shape::kVectors) {
        with_count<Shape::kVectors>(smaller(Shape::kVectors, end - j), [&](auto vectors) {
          with_count<Shape::kTokens>(height, [&](auto tokens) {
            multiply_groups<Layout, tokens.value, vectors.value>(
                x + t * groups, rows + j, groups, ahead, totals + t * stride + j * kLanes, stride);
          });
        });
      }
    }
  }
}

template <typename Format, typename Shape>
int64_t chunk_groups(const LinearParams& p) {
  using Layout = typename Format::Layout;
  if (Format::kInPlace && p.num_tokens <= kStreamTokens) return num_groups<Layout>(p.k);
  return Shape::kChunk / Layout::kGroup;
}

// What a task has besides the activations: chunks that were unpacked, and sums of all tokens.
template <typename Format, typename Shape>
struct TaskMemory {
  using Layout = typename Format::Layout;
  static constexpr int64_t kStride = Shape::kTiles * kWeightTile;
  int64_t chunk_bytes, totals_size;
  uint8_t* chunks;
  float *totals, *gates;

  explicit TaskMemory(const FusedLinearParams& p)
      : chunk_bytes(Format::kInPlace ? 0 : chunk_groups<Format, Shape>(p) * Layout::kBytes),
        totals_size(p.num_tokens * kStride) {
    const int64_t totals_bytes = (p.gate_up ? 2 : 1) * totals_size * sizeof(float);
    chunks =
        static_cast<uint8_t*>(scratch(Scratch::kTask, Shape::kTiles * chunk_bytes + totals_bytes));
    totals = reinterpret_cast<float*>(chunks + Shape::kTiles * chunk_bytes);
    gates = totals + totals_size;
  }
};

// totals = all tokens by `count` tiles; `next`: as many, to be multiplied after these.
template <typename Format, typename Shape>
void multiply_block(const FusedLinearParams& p, Panels panels,
                    const TokensOf<typename Format::Layout>* x, const PlacedTile* tiles,
                    const PlacedTile* next_tiles, int64_t count,
                    const TaskMemory<Format, Shape>& memory, float* totals) {
  using Layout = typename Format::Layout;
  const int64_t groups = num_groups<Layout>(p.k), chunk = chunk_groups<Format, Shape>(p);
  const int64_t ahead = memory_is_the_limit<Layout>(p.num_tokens) ? kAhead : 2 * kAhead;
  std::memset(totals, 0, memory.totals_size * sizeof(float));
  for (int64_t g = 0; g < groups; g += chunk) {
    const int64_t length = smaller(chunk, groups - g);
    RowVector rows[Shape::kTiles * kParts];
    for (int64_t i = 0; i < count; ++i) {
      const uint8_t* head = head_of<Format>(tiles[i], p.k);
      const uint8_t* at =
          Groups<Format>::load(tiles[i], p.k, g, length, memory.chunks + i * memory.chunk_bytes);
      const uint8_t* next = Format::kInPlace && chunk == groups ? at + ahead
                            : g + length < groups
                                ? Groups<Format>::source(tiles[i], p.k, g + length)
                                : Groups<Format>::source(next_tiles[i], p.k, 0);
      for (int part = 0; part < kParts; ++part) rows[i * kParts + part] = {head, at, next, part};
    }
    multiply_chunk<Layout, Shape>(x + g * p.num_tokens, panels, length, Groups<Format>::kBytes,
                                  rows, count * kParts, totals, memory.kStride);
  }
}

// Tiles [first, end).
template <typename Format, typename Shape>
void multiply_tiles(const FusedLinearParams& p, Panels panels,
                    const TokensOf<typename Format::Layout>* x, int64_t first, int64_t end) {
  const TaskMemory<Format, Shape> memory(p);
  const auto find = [&](int64_t i, int64_t from, PlacedTile* tiles) {
    for (int64_t j = 0; j < Shape::kTiles; ++j)
      tiles[j] = find_tile(p, smaller(i + j, end - 1) + from);
  };
  const int64_t ups = ceil_div(p.n[0], kWeightTile);
  for (; first < end; first += Shape::kTiles) {
    const int64_t count = smaller(Shape::kTiles, end - first);
    PlacedTile tiles[Shape::kTiles], up_tiles[Shape::kTiles], next_tiles[Shape::kTiles];
    find(first, 0, tiles);
    find(first + Shape::kTiles, 0, next_tiles);
    if (p.gate_up) {
      find(first, ups, up_tiles);
      multiply_block<Format>(p, panels, x, tiles, up_tiles, count, memory, memory.gates);
      multiply_block<Format>(p, panels, x, up_tiles, next_tiles, count, memory, memory.totals);
      put_tiles(p, tiles, count, memory.totals, memory.gates, memory.kStride);
    } else {
      multiply_block<Format>(p, panels, x, tiles, next_tiles, count, memory, memory.totals);
      put_tiles(p, tiles, count, memory.totals, nullptr, memory.kStride);
    }
  }
}

template <typename Format, typename Shape>
void multiply(const FusedLinearParams& p) {
  using Layout = typename Format::Layout;
  const int64_t groups = num_groups<Layout>(p.k);
  int64_t tiles = 0;
  for (int64_t i = 0; i < p.num_weights; ++i) tiles += ceil_div(p.n[i], kWeightTile);
  if (tiles == 0) return;
  const Panels panels = {p.num_tokens, Shape::kTokens};
  const int64_t x_bytes = p.num_tokens * groups * sizeof(TokensOf<Layout>);
  auto* x = static_cast<TokensOf<Layout>*>(scratch(Scratch::kCaller, x_bytes));
  pack_all<Layout>(p, chunk_groups<Format, Shape>(p), panels, x);
  // With more than kStreamTokens the work counts for a second task: 32 tokens by 200 KB take 75 us.
  const int64_t bytes = tiles * groups * Layout::kBytes;
  const int64_t work = bytes * larger(p.num_tokens, kStreamTokens) / kStreamTokens;
  const int64_t few_tasks = larger(num_stream_tasks(bytes), smaller(2, num_stream_tasks(work)));
  const int64_t tasks = p.num_tokens > kFewTokens ? kTasks : few_tasks;
  if (p.gate_up) tiles /= 2;
  const int64_t task_tiles = ceil_div(tiles, Shape::kTiles * tasks) * Shape::kTiles;
  for_each_task(ceil_div(tiles, task_tiles), [&](int64_t task) {
    const int64_t first = task * task_tiles;
    multiply_tiles<Format, Shape>(p, panels, x, first, smaller(tiles, first + task_tiles));
  });
}

}  // namespace

void linear_quantized(const FusedLinearParams& params) {
  const int64_t parts = ceil_div(params.num_tokens, kMaxTokens);
  if (parts == 0) return;
  for_tokens(params, ceil_div(params.num_tokens, parts), [&](const FusedLinearParams& p) {
    with_format(p.weight_dtype, [&](auto format) {
      using Format = decltype(format);
      using Wide = std::conditional_t<kIsPacked<Format>, Widened<Format>, Format>;
      if (p.num_tokens > kFewTokens) return multiply<Wide, Many<typename Wide::Layout>>(p);
      if (!p.gate_up) return multiply<Format, Few>(p);
      multiply<Format, Few>(before_gating(p));
      gate(p);
    });
  });
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
