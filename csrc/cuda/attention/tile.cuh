// A warp's 16 rows against one tile of kTile keys: scores, softmax, values, by mma.m16n8k16. Lane
// 4 g + t holds rows g and g + 8; "row 0" and "row 1" below are these two.
//
// Order of every sum: 16 elements of a head at a time, ascending (of a quantised one: of the
// permutation below); within a tile 16 keys at a time; tiles of a split ascending.
#pragma once

#include "cuda/attention/plan.cuh"

namespace codellama_rt {
namespace cuda {

constexpr int kGroups = kTile / 8;  // of 8 keys: one fragment of scores

struct RowState {
  float o[kDim / 8][4];
  float m[2], l[2];  // m in units of log2; l is this lane's share until `complete`

  CLRT_DEVICE void clear() {
    for (auto& fragment : o) {
      for (float& x : fragment) x = 0;
    }
    m[0] = m[1] = -INFINITY;
    l[0] = l[1] = 0;
  }
  // l of the four lanes of a row, in all of them.
  CLRT_DEVICE void complete() {
    for (int row = 0; row < 2; ++row) {
      l[row] = __fadd_rn(l[row], __shfl_xor_sync(kAllLanes, l[row], 1));
      l[row] = __fadd_rn(l[row], __shfl_xor_sync(kAllLanes, l[row], 2));
    }
  }
};

// Joins (m, l, o) of more keys to what there is: o * before + o_more * more. Keys that a row does
// not see leave every bit as it was.
struct FoldScales {
  float before, more;

  CLRT_DEVICE float operator()(float x, float y) const {
    return more == 0 ? x : __fmaf_rn(y, more, __fmul_rn(x, before));
  }
};
CLRT_DEVICE FoldScales fold_scales(float& m, float& l, float m_more, float l_more) {
  if (m_more == -INFINITY && l_more == 0) return {1, 0};  // NaN has no maximum, but a sum
  const float top = fmaxf(m, m_more);
  const FoldScales scales{ptx::exp2(m - top), ptx::exp2(m_more - top)};
  m = top;
  l = __fmaf_rn(l_more, scales.more, __fmul_rn(l, scales.before));
  return scales;
}
CLRT_DEVICE void fold(RowState& total, const RowState& part) {
  for (int row = 0; row < 2; ++row) {
    const FoldScales scales = fold_scales(total.m[row], total.l[row], part.m[row], part.l[row]);
    for (int i = 0; i < kDim / 8; ++i) {
      for (int j = 2 * row; j < 2 * row + 2; ++j) {
        total.o[i][j] = scales(total.o[i][j], part.o[i][j]);
      }
    }
  }
}

// Scores to weights e^(s - max), and what they do to the state. visible: keys of this tile that
// rows 0 and 1 see, at most kTile.
CLRT_DEVICE void softmax(float (&s)[kGroups][4], const int (&visible)[2], float scale_log2,
                         RowState& state) {
  const int column = threadIdx.x % 4 * 2;
  float before[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    if (visible[row] < kTile) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (8 * i + column + j >= visible[row]) s[i][2 * row + j] = -INFINITY;
        }
      }
    }
    float top = -INFINITY;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      top = fmaxf(top, fmaxf(s[i][2 * row], s[i][2 * row + 1]));
    }
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 1));
    top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, 2));
    const float m = fmaxf(state.m[row], __fmul_rn(top, scale_log2));
    const float shift = m == -INFINITY ? 0 : m;
    before[row] = ptx::exp2(__fadd_rn(state.m[row], -shift));
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& x = s[i][2 * row + j];
        x = ptx::exp2(__fmaf_rn(x, scale_log2, -shift));
        sum = __fadd_rn(sum, x);
      }
    }
    state.m[row] = m;
    state.l[row] = __fmaf_rn(state.l[row], before[row], sum);
  }
  // After a few tiles no row's maximum rises any more: times 1 changes nothing.
  if (!__any_sync(kAllLanes, before[0] != 1 || before[1] != 1)) return;
#pragma unroll
  for (int i = 0; i < kDim / 8; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) state.o[i][j] = __fmul_rn(state.o[i][j], before[j / 2]);
  }
}

// Weights of 16 keys as the first operand of a product.
template <typename T>
CLRT_DEVICE void pack_weights(const float (&s)[kGroups][4], int keys16, uint32_t (&a)[4]) {
  const float (&low)[4] = s[2 * keys16], (&high)[4] = s[2 * keys16 + 1];
  a[0] = pack<T>(low[0], low[1]);
  a[1] = pack<T>(low[2], low[3]);
  a[2] = pack<T>(high[0], high[1]);
  a[3] = pack<T>(high[2], high[3]);
}

// Tiles of f16 or bf16, swizzled as the copy engine leaves them: parts of 64 elements of the head,
// each kTile rows of 128 bytes, whose 16-byte pieces change places by the row's number.
template <typename T>
struct FloatTile {
  using Math = T;
  static constexpr int kBytes = kTile * kDim * 2, kStages = 3;
  static constexpr int kWorkers = 4;  // warps a block: with 48 KiB each they fill an SM's memory
  static constexpr int kPartBytes = kTile * 128;
  static constexpr bool kQuantized = false;

  CLRT_DEVICE static int offset(int key, int piece) {
    return piece / 8 * kPartBytes + key * 128 + ((piece % 8) ^ (key % 8)) * 16;
  }
  // Elements 16 * step + {2t, 2t + 1} and + 8 of a row of the query.
  CLRT_DEVICE static int query_element(int step, int half) {
    return 16 * step + 8 * half + threadIdx.x % 4 * 2;
  }
  // Element of the head that o[i][j % 2] is.
  CLRT_DEVICE static int out_element(int i, int j) { return 8 * i + threadIdx.x % 4 * 2 + j % 2; }

  CLRT_DEVICE static void scores(const unsigned char* tile, const uint32_t (&q)[kDim / 16][4],
                                 float (&s)[kGroups][4]) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      for (float& x : s[i]) x = 0;
#pragma unroll
      for (int step = 0; step < kDim / 16; step += 2) {
        uint32_t k[4];
        ptx::load_matrices(k, tile + offset(8 * i + lane % 8, 2 * step + lane / 8));
        ptx::mma<T>(s[i], q[step], k[0], k[1]);
        ptx::mma<T>(s[i], q[step + 1], k[2], k[3]);
      }
    }
  }
  CLRT_DEVICE static void add_values(const unsigned char* tile, const float (&s)[kGroups][4],
                                     float (&o)[kDim / 8][4]) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int keys16 = 0; keys16 < kTile / 16; ++keys16) {
      uint32_t p[4];
      pack_weights<T>(s, keys16, p);
#pragma unroll
      for (int i = 0; i < kDim / 8; i += 2) {
        uint32_t v[4];
        ptx::load_matrices_transposed(v, tile + offset(16 * keys16 + lane % 16, i + lane / 16));
        ptx::mma<T>(o[i], p, v[0], v[1]);
        ptx::mma<T>(o[i + 1], p, v[2], v[3]);
      }
    }
  }
  // Keys from `first` on get zeros for values: 0 times what happens to lie there may be NaN.
  CLRT_DEVICE static void clear_from(unsigned char* tile, int first, int thread, int num_threads) {
    constexpr int kPieces = kDim / 8;
    for (int i = first * kPieces + thread; i < kTile * kPieces; i += num_threads) {
      *reinterpret_cast<uint4*>(tile + offset(i / kPieces, i % kPieces)) = uint4{};
    }
  }
};

// Four bytes of an int8 or fp8 row at bits 0-7 and 16-23 of a register, to two bf16, exactly.
template <typename Cache>
CLRT_DEVICE uint32_t to_bf16x2(uint32_t x);
template <>
CLRT_DEVICE uint32_t to_bf16x2<int8_row>(uint32_t x) {
  // 128 + the low 7 bits, minus 128 or (sign bit set) 256: all of them bf16.
  return ptx::fma_bf16x2((x & 0x00800080) | 0x43004300, 0xbf80bf80, (x & 0x007f007f) | 0x43004300);
}
template <>
CLRT_DEVICE uint32_t to_bf16x2<fp8_row>(uint32_t x) {
  // Sign, exponent and mantissa in their places; the exponent's bias is 120 short.
  return ptx::fma_bf16x2((x & 0x00800080) << 8 | (x & 0x007f007f) << 4, 0x7b807b80, 0x80008000);
}

// Tiles of int8 or fp8 rows as they lie in their page, computed in bf16. A lane takes 16 bytes of
// a row at a time, so elements stand in another order than in FloatTile: alike on both sides of a
// product, where order does not matter, and undone by out_element where it does.
template <typename Cache, int kWarps>
struct QuantizedTile {
  using Math = bf16;
  static constexpr int kGroupBytes = kCacheGroup * (kDim + 4);
  static constexpr int kBytes = kTile / kCacheGroup * kGroupBytes, kStages = 24 / kWarps;
  static constexpr int kWorkers = kWarps;  // 24 stages, 198 KiB, for all of them
  static constexpr bool kQuantized = true;

  CLRT_DEVICE static const unsigned char* row(const unsigned char* tile, int key) {
    return tile + key / kCacheGroup * kGroupBytes + key % kCacheGroup * kDim;
  }
  CLRT_DEVICE static float scale(const unsigned char* tile, int key) {
    return *reinterpret_cast<const float*>(tile + key / kCacheGroup * kGroupBytes +
                                           kCacheGroup * kDim + key % kCacheGroup * 4);
  }
  CLRT_DEVICE static int query_element(int step, int half) {
    return step / 4 * 64 + threadIdx.x % 4 * 16 + step % 4 * 4 + 2 * half;
  }
  CLRT_DEVICE static int out_element(int i, int j) {
    return 16 * (threadIdx.x % 4 * 2 + j % 2) + i;
  }

  CLRT_DEVICE static void scores(const unsigned char* tile, const uint32_t (&q)[kDim / 16][4],
                                 float (&s)[kGroups][4]) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      for (float& x : s[i]) x = 0;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 k = *reinterpret_cast<const uint4*>(row(tile, 8 * i + g) + 64 * half + 16 * t);
        const uint32_t words[4] = {k.x, k.y, k.z, k.w};
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          const uint32_t low = to_bf16x2<Cache>(ptx::permute_bytes(words[step], 0, 0x4140));
          const uint32_t high = to_bf16x2<Cache>(ptx::permute_bytes(words[step], 0, 0x4342));
          ptx::mma<bf16>(s[i], q[4 * half + step], low, high);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) s[i][j] = __fmul_rn(s[i][j], scale(tile, 8 * i + 2 * t + j % 2));
    }
  }
  CLRT_DEVICE static void add_values(const unsigned char* tile, const float (&s)[kGroups][4],
                                     float (&o)[kDim / 8][4]) {
    const int g = threadIdx.x % kWarp / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int keys16 = 0; keys16 < kTile / 16; ++keys16) {
      const int key = 16 * keys16 + 2 * t;
      uint32_t words[4][4];  // keys 2t, 2t + 1, 2t + 8, 2t + 9
      float weights[kGroups][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int its_key = key + i % 2 + i / 2 * 8;
        const uint4 v = *reinterpret_cast<const uint4*>(row(tile, its_key) + 16 * g);
        words[i][0] = v.x;
        words[i][1] = v.y;
        words[i][2] = v.z;
        words[i][3] = v.w;
        const float its_scale = scale(tile, its_key);
        for (int j = i % 2; j < 4; j += 2) {
          weights[2 * keys16 + i / 2][j] = __fmul_rn(s[2 * keys16 + i / 2][j], its_scale);
        }
      }
      uint32_t p[4];
      pack_weights<bf16>(weights, keys16, p);
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        const uint32_t bytes = 0x0400 + i % 4 * 0x0101;  // byte i of the one, byte i of the other
        const uint32_t low = ptx::permute_bytes(words[0][i / 4], words[1][i / 4], bytes);
        const uint32_t high = ptx::permute_bytes(words[2][i / 4], words[3][i / 4], bytes);
        ptx::mma<bf16>(o[i], p, to_bf16x2<Cache>(low), to_bf16x2<Cache>(high));
      }
    }
  }
  // Zeros for values: of scales too, lest what happens to lie there be NaN.
  CLRT_DEVICE static void clear_from(unsigned char* tile, int first, int thread, int num_threads) {
    for (int key = first + thread; key < kTile; key += num_threads) {
      unsigned char* group = tile + key / kCacheGroup * kGroupBytes;
      for (int i = 0; i < kDim; i += 16) {
        *reinterpret_cast<uint4*>(group + key % kCacheGroup * kDim + i) = uint4{};
      }
      *reinterpret_cast<float*>(group + kCacheGroup * kDim + key % kCacheGroup * 4) = 0;
    }
  }
};

}  // namespace cuda
}  // namespace codellama_rt
