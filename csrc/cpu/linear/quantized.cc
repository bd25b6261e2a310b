// linear over quantised weights: out[t, n] = sum over k of x[t, k] * weight[n, k]
// Shapes   x (num_tokens, k), weights (n[i], k) in one format, out (num_tokens, sum(n))
// Traffic  the weights' bytes once for every kMaxTokens tokens
// Limit    memory read to about 4 tokens (int8, int4: as fast as the probe of memory reads), then
//          VPDPBUSD: 1,190 GOP/s at 512 tokens over int8, 1,060 over int4, 750 over bfloat16 in the
//          same run, two cores. Of a GGUF block's time at 1 token two thirds go into transposing it
// Tiling   activations are quantised once, in panels of kHeight tokens. A task takes blocks of
//          tiles of 16 rows, and of a block chunks of groups along k: few enough to stay in cache
//          until all tokens have read them. GGUF's blocks are unpacked into such a chunk, own
//          formats lie in their order already. kHeight tokens by kWidth vectors of rows are
//          multiplied at a time; a lane is a row, so nothing is ever summed across lanes
// Numerics x is quantised per token and group of the weight along k, over int8 rotated first:
//          scale = max|x| / 127 in float32,
//          value = x * (127 / max) rounded to nearest even. A group's dot product is an exact
//          integer; then, in ascending order of the groups, for each of its scales,
//            sum = fma(float(dot), x_scale * weight_scale, sum)
//          and, in formats that have one, sum = fma(minimum, x_scale * sum(values), sum).
//          No choice of tile, chunk, task or instruction set touches that (but where there is no
//          fma it rounds twice). A NaN or an infinity in x makes its token's results NaN
#include "cpu/linear/quantized.h"

#include "cpu/linear/formats.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kHeight = 6;  // 12 integer and 12 float sums, 2 weights and 1 activation in 32
constexpr int kWidth = 2;
#else
constexpr int kHeight = 2;
constexpr int kWidth = 2;
#endif
constexpr int64_t kMaxTokens = 516;  // 86 panels; bounds the scratch memory, not the result
constexpr int64_t kFewTokens = 3 * kHeight;
constexpr int64_t kBlockTiles = 4;  // with many tokens: 64 rows
constexpr int64_t kFewTiles = 2;
constexpr int64_t kChunk = 1536;  // of k; 32 rows of it: 52 KB; 1024 and 2048 were 2 to 5 % slower
constexpr int64_t kFewChunk = 512;  // 32 rows of it: 17 KB of L1
constexpr int64_t kTasks = 32;
constexpr int64_t kPrefetchBytes = 4096;  // every line of it: one a group gave int4 86 %, not 100
constexpr int64_t kCacheLine = 64;

// ---- activations: panels (group, token) ----------------------------------------------------

template <typename Layout>
using TokensOf = TokenGroup<Layout::kGroup>;

template <typename Layout, typename X>
void pack_tokens(const LinearParams& p, int64_t t, int64_t height, TokensOf<Layout>* panel) {
  const int64_t groups = num_groups<Layout>(p.k);
  for (int64_t i = 0; i < height; ++i) {
    const X* x = static_cast<const X*>(p.x) + (t + i) * p.x_stride;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t k = g * Layout::kGroup;
      quantize_group<Layout::kRotated>(x + k, smaller(Layout::kGroup, p.k - k), Layout::kBias,
                                       Layout::kHalves == 2, panel[g * height + i]);
    }
  }
}

template <typename Layout>
void pack_panel(const LinearParams& p, int64_t t, int64_t height, TokensOf<Layout>* panel) {
  with_type(p.x_dtype, [&](auto x) { pack_tokens<Layout, decltype(x)>(p, t, height, panel); });
}

// Few tokens are packed by the caller: handing out would take longer.
template <typename Layout>
void pack_all(const LinearParams& p, TokensOf<Layout>* x) {
  const int64_t groups = num_groups<Layout>(p.k), panels = ceil_div(p.num_tokens, kHeight);
  const auto pack = [&](int64_t i) {
    const int64_t t = i * kHeight;
    pack_panel<Layout>(p, t, smaller(kHeight, p.num_tokens - t), x + t * groups);
  };
  if (p.num_tokens > kFewTokens) return for_each_task(panels, pack);
  for (int64_t i = 0; i < panels; ++i) pack(i);
}

// ---- the inner loop ------------------------------------------------------------------------

// One vector of rows: a part of a tile's groups.
struct RowVector {
  const uint8_t *head, *groups;
  int part;
};

// What a pass over weights prefetches: so many lines for each group, so far ahead of it.
struct Ahead {
  int64_t bytes, lines;
};

// totals[t][j] += the products of `groups` groups; tokens kTokens apart in x, rows of totals
// `stride` apart.
template <typename Layout, int kTokens, int kVectors>
__attribute__((noinline)) void multiply_groups(const TokensOf<Layout>* x, const RowVector* rows,
                                               int64_t groups, Ahead ahead, float* totals,
                                               int64_t stride) {
  constexpr int kHalfQuads = Layout::kGroup / 4 / Layout::kHalves;
  // One sum would wait for its own last product: 4 to 5 cycles.
  constexpr int kChains = kTokens * kVectors < 4 ? 2 : 1;
  const uint8_t* group[kVectors];
  int part[kVectors];
  Vec sums[kTokens][kVectors];
  for (int j = 0; j < kVectors; ++j) {
    group[j] = rows[j].groups;
    part[j] = kParts == 1 ? 0 : rows[j].part;
    for (int t = 0; t < kTokens; ++t) sums[t][j] = load(totals + t * stride + j * kLanes);
  }
  for (; groups > 0; --groups, x += kTokens) {
#pragma GCC unroll 2
    for (int half = 0; half < Layout::kHalves; ++half) {
      Ints dots[kChains][kTokens][kVectors];
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) {
          dots[0][t][j] = splat_int(x[t].start[half]);
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
          const Quad quad = load_quad(x[t].values + 4 * q);
#pragma GCC unroll 2
          for (int j = 0; j < kVectors; ++j) {
            Ints& sum = dots[q % kChains][t][j];
            sum = dot(w[j], quad, sum);
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
          sums[t][j] = fma(product, splat(x[t].scale) * scales, sums[t][j]);
        }
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      if (Layout::kHasMinimum) {
        const Vec minima = Layout::minima(rows[j].head, group[j], part[j]);
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          sums[t][j] = fma(minima, splat(x[t].scaled_sum), sums[t][j]);
        }
      }
      for (int64_t i = 0; i < ahead.lines; ++i) {
        __builtin_prefetch(group[j] + ahead.bytes + i * kCacheLine);
      }
      group[j] += Layout::kBytes;
    }
  }
  for (int j = 0; j < kVectors; ++j) {
    for (int t = 0; t < kTokens; ++t) store(totals + t * stride + j * kLanes, sums[t][j]);
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

// A token's tiles together: rows of `out` lie pages apart.
inline void put_tiles(const LinearParams& p, const PlacedTile* tiles, int64_t count,
                      const float* totals, int64_t stride) {
  with_type(p.out_dtype, [&](auto out_type) {
    using T = decltype(out_type);
    for (int64_t t = 0; t < p.num_tokens; ++t) {
      T* out = static_cast<T*>(p.out) + t * p.out_stride;
      for (int64_t i = 0; i < count; ++i) {
        convert(totals + t * stride + i * kWeightTile, out + tiles[i].column, tiles[i].num_rows);
      }
    }
  });
}

// ---- blocks of tiles -----------------------------------------------------------------------

struct Cut {
  int64_t tiles, groups;  // of a block, of a chunk
};

// All tokens by one chunk of a block's tiles: a few vectors of rows stay in L1, the tokens pass.
template <typename Layout>
void multiply_chunk(const LinearParams& p, const TokensOf<Layout>* x, int64_t g, int64_t count,
                    Ahead ahead, const RowVector* rows, int64_t num_vectors, float* totals,
                    int64_t stride) {
  const int64_t groups = num_groups<Layout>(p.k);
  for (int64_t j = 0; j < num_vectors; j += kWidth) {
    with_count<kWidth>(smaller(kWidth, num_vectors - j), [&](auto vectors) {
      for (int64_t t = 0; t < p.num_tokens; t += kHeight) {
        const int64_t height = smaller(kHeight, p.num_tokens - t);
        const TokensOf<Layout>* panel = x + t * groups + g * height;
        with_count<kHeight>(height, [&](auto tokens) {
          multiply_groups<Layout, tokens.value, vectors.value>(
              panel, rows + j, count, t == 0 ? ahead : Ahead{0, 0},
              totals + t * stride + j * kLanes, stride);
        });
      }
    });
  }
}

// Tiles [first, end).
template <typename Format>
void multiply_tiles(const LinearParams& p, const Cut& cut,
                    const TokensOf<typename Format::Layout>* x, int64_t first, int64_t end) {
  using Layout = typename Format::Layout;
  const int64_t groups = num_groups<Layout>(p.k), stride = cut.tiles * kWeightTile;
  const int64_t totals_bytes = p.num_tokens * stride * sizeof(float);
  const int64_t chunk_bytes = Format::kInPlace ? 0 : cut.groups * Layout::kBytes;
  char* memory =
      static_cast<char*>(scratch(Scratch::kTask, totals_bytes + cut.tiles * chunk_bytes));
  float* totals = reinterpret_cast<float*>(memory + cut.tiles * chunk_bytes);
  // The first pass over a chunk fetches the next one; a single pass, what it needs soon itself.
  const Ahead ahead = {cut.groups < groups ? cut.groups * Layout::kBytes : kPrefetchBytes,
                       Format::kInPlace ? ceil_div(Layout::kBytes, kCacheLine) : 0};
  for (; first < end; first += cut.tiles) {
    const int64_t count = smaller(cut.tiles, end - first);
    PlacedTile tiles[kBlockTiles];
    RowVector rows[kBlockTiles * kParts];
    for (int64_t i = 0; i < count; ++i) tiles[i] = find_tile(p, first + i);
    std::memset(totals, 0, totals_bytes);
    for (int64_t g = 0; g < groups; g += cut.groups) {
      const int64_t length = smaller(cut.groups, groups - g);
      for (int64_t i = 0; i < count; ++i) {
        uint8_t* to = reinterpret_cast<uint8_t*>(memory) + i * chunk_bytes;
        const uint8_t* at = groups_of<Format>(tiles[i], p.k, g, length, to);
        const uint8_t* head = head_of<Format>(tiles[i], p.k);
        for (int part = 0; part < kParts; ++part) rows[i * kParts + part] = {head, at, part};
      }
      multiply_chunk<Layout>(p, x, g, length, ahead, rows, count * kParts, totals, stride);
    }
    put_tiles(p, tiles, count, totals, stride);
  }
}

// One tile when one panel of tokens reads it once; else blocks that stay in cache. A chunk is whole
// blocks of any format.
template <typename Format>
Cut cut_for(const LinearParams& p) {
  using Layout = typename Format::Layout;
  constexpr int64_t kFewGroups = kFewChunk / Layout::kGroup;
  if (p.num_tokens > kFewTokens) return {kBlockTiles, kChunk / Layout::kGroup};
  if (p.num_tokens <= kHeight) return {1, Format::kInPlace ? num_groups<Layout>(p.k) : kFewGroups};
  return {kFewTiles, kFewGroups};
}

template <typename Format>
void multiply(const LinearParams& p) {
  using Layout = typename Format::Layout;
  const int64_t groups = num_groups<Layout>(p.k);
  int64_t tiles = 0;
  for (int64_t i = 0; i < p.num_weights; ++i) tiles += ceil_div(p.n[i], kWeightTile);
  if (tiles == 0) return;
  const int64_t x_bytes = p.num_tokens * groups * sizeof(TokensOf<Layout>);
  auto* x = static_cast<TokensOf<Layout>*>(scratch(Scratch::kCaller, x_bytes));
  pack_all<Layout>(p, x);
  const Cut cut = cut_for<Format>(p);
  int64_t task_tiles = kBlockTiles * larger(1, tiles / (kBlockTiles * kTasks));
  if (p.num_tokens <= kFewTokens) {
    const int64_t tasks = num_stream_tasks(tiles * groups * Layout::kBytes);
    task_tiles = ceil_div(tiles, cut.tiles * tasks) * cut.tiles;
  }
  for_each_task(ceil_div(tiles, task_tiles), [&](int64_t task) {
    const int64_t first = task * task_tiles;
    multiply_tiles<Format>(p, cut, x, first, smaller(tiles, first + task_tiles));
  });
}

}  // namespace

void linear_quantized(const LinearParams& params) {
  const int64_t parts = ceil_div(params.num_tokens, kMaxTokens);
  if (parts == 0) return;
  const int64_t tokens = ceil_div(ceil_div(params.num_tokens, parts), kHeight) * kHeight;
  for (int64_t t = 0; t < params.num_tokens; t += tokens) {
    LinearParams p = params;
    p.num_tokens = smaller(tokens, params.num_tokens - t);
    p.x = static_cast<const char*>(p.x) + t * p.x_stride * item_size(p.x_dtype);
    p.out = static_cast<char*>(p.out) + t * p.out_stride * item_size(p.out_dtype);
    with_format(p.weight_dtype, [&](auto format) { multiply<decltype(format)>(p); });
  }
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
