// quantize: a float weight to int8 or int4 with a scale for 32 elements along k
// Shapes   weight (n, k); payload: tiles of 16 rows of groups, as quantized.h says
// Traffic  n * k * itemsize bytes read, weight_bytes(n, k) written, once each
// Limit    arithmetic for int4: kTrials roundings an element
// Tiling   a task takes tiles of 16 rows; kLanes rows at a time are transposed, so that a lane is a
//          row and nothing is summed across lanes
// Numerics no fused multiply-add: every instruction set and ops/reference.py give the same bytes.
//          int8: scale = bfloat16(max|w| / 127), value = w / scale rounded to nearest even.
//          int4: values -8 to 7, a scale of either sign. Of kTrials grids on which the element of
//          largest magnitude stands at -8 + trial's offset, the one with the least squared error;
//          its scale refitted by least squares, rounded to bfloat16, and the values rounded anew.
//          A group with a NaN or an infinity gets a scale of NaN. Rows and elements that fill the
//          last tile and group have the value 0
#include "../ops.h"
#include "int_dot.h"
#include "task.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int kGroup = int(kWeightGroup);
constexpr int64_t kTaskBytes = 256 << 10;  // of payload
// Below it 1 / scale would overflow: such a group becomes zeros.
constexpr float kSmallestScale = 0x1p-120f;
// Where the largest element stands; SmolLM2's perplexity by them is in csrc/README.md.
constexpr float kTrials[] = {-9.0f, -8.5f, -8.0f, -7.5f, -7.0f};

struct Columns {
  Vec at[kGroup];  // element i of kLanes rows
};

// Rows [row, row + kLanes) and elements [k, k + 32) of the weight, zero outside it.
template <typename T>
void load_columns(const QuantizeParams& p, int64_t row, int64_t k, Columns& columns) {
  const T* weight = static_cast<const T*>(p.weight);
  for (int i = 0; i < kGroup; i += kLanes) {
    Vec block[kLanes];
    const int64_t left = p.k - (k + i);
    for (int r = 0; r < kLanes; ++r) {
      const T* from = weight + (row + r) * p.k + k + i;
      block[r] = row + r >= p.n || left <= 0 ? splat(0.0f)
                 : left >= kLanes            ? load(from)
                                             : load_first(from, int(left));
    }
    transpose(block);
    for (int c = 0; c < kLanes; ++c) columns.at[i + c] = block[c];
  }
}

inline Vec rounded_to_bf16(Vec x) {
  bf16 lanes[kLanes];
  store(lanes, x);
  return load(lanes);
}

// 1 / scale; 0 where a scale is too small for that, or is NaN.
inline Vec inverse(Vec scale) {
  float lanes[kLanes];
  store(lanes, scale);
  for (float& lane : lanes) lane = std::fabs(lane) >= kSmallestScale ? 1.0f / lane : 0.0f;
  return load(lanes);
}

// The element of largest magnitude of each row, with its sign; the first of equals.
inline Vec largest(const Columns& columns) {
  Vec high = columns.at[0], low = columns.at[0];
  for (const Vec& column : columns.at) high = max(column, high), low = min(column, low);
  float highs[kLanes], lows[kLanes];
  store(highs, high);
  store(lows, low);
  for (int i = 0; i < kLanes; ++i) highs[i] = -lows[i] > highs[i] ? lows[i] : highs[i];
  return load(highs);
}

inline Vec not_finite(const Columns& columns) {  // NaN where a row has such an element, else 0
  Vec poison = splat(0.0f);
  for (const Vec& column : columns.at) poison = poison + (column - column);
  return poison;
}

inline Vec nearest(Vec x, Vec inverse_scale, float low, float high) {
  return min(splat(high), max(splat(low), round(x * inverse_scale)));
}

inline Vec int8_scale(const Columns& columns) {
  const Vec most = largest(columns);
  return rounded_to_bf16(max(most, splat(0.0f) - most) / splat(127.0f) + not_finite(columns));
}

inline Vec int4_scale(const Columns& columns) {
  const Vec top = inverse(largest(columns));
  float best[kLanes] = {}, scales[kLanes] = {};
  for (const float place : kTrials) {
    const Vec factor = splat(place) * top;
    Vec products = splat(0.0f), squares = splat(0.0f);
    for (const Vec& column : columns.at) {
      const Vec value = nearest(column, factor, -8.0f, 7.0f);
      products = products + column * value;
      squares = squares + value * value;
    }
    // With the scale products / squares the squared error is sum(w^2) - products^2 / squares.
    float p[kLanes], s[kLanes];
    store(p, products);
    store(s, squares);
    for (int i = 0; i < kLanes; ++i) {
      const float scale = s[i] > 0 ? p[i] / s[i] : 0.0f, gain = p[i] * scale;
      if (gain > best[i]) best[i] = gain, scales[i] = scale;
    }
  }
  return rounded_to_bf16(load(scales) + not_finite(columns));
}

// kLanes rows of a group of a tile, from row `lane` of the tile on.
template <typename T>
void quantize_rows(const QuantizeParams& p, int64_t tile, int64_t g, int lane, uint8_t* group) {
  const bool wide = p.dtype == DType::kInt8;
  Columns columns;
  load_columns<T>(p, tile * kWeightTile + lane, g * kWeightGroup, columns);
  const Vec scale = wide ? int8_scale(columns) : int4_scale(columns);
  const Vec factor = inverse(scale);
  const float low = wide ? -127.0f : -8.0f, high = wide ? 127.0f : 7.0f;
  uint8_t values[kGroup][kLanes];
  for (int i = 0; i < kGroup; ++i) {
    float lanes[kLanes];
    store(lanes, nearest(columns.at[i], factor, low, high));
    for (int r = 0; r < kLanes; ++r) values[i][r] = uint8_t(int(lanes[r]) + (wide ? 128 : 8));
  }
  for (int i = 0; i < (wide ? kGroup : kGroup / 2); ++i) {
    uint8_t* to = group + i / 4 * kStepBytes + lane * 4 + i % 4;
    for (int r = 0; r < kLanes; ++r) {
      to[4 * r] = wide ? values[i][r] : uint8_t(values[i][r] | values[i + kGroup / 2][r] << 4);
    }
  }
  uint8_t* scales = group + (wide ? kValuesBytes : kValuesBytes / 2);
  store(reinterpret_cast<bf16*>(scales) + lane, scale);
}

}  // namespace

void quantize(const QuantizeParams& p) {
  const int64_t groups = ceil_div(p.k, kWeightGroup), tiles = ceil_div(p.n, kWeightTile);
  if (groups == 0 || tiles == 0) return;
  const int64_t group_bytes = weight_bytes(p.dtype, kWeightTile, kWeightGroup);
  for_each_row(tiles, groups * group_bytes * 32768 / kTaskBytes, [&](int64_t tile) {
    with_type(p.weight_dtype, [&](auto weight) {
      uint8_t* group = static_cast<uint8_t*>(p.payload) + tile * groups * group_bytes;
      for (int64_t g = 0; g < groups; ++g, group += group_bytes) {
        for (int lane = 0; lane < kWeightTile; lane += kLanes) {
          quantize_rows<decltype(weight)>(p, tile, g, lane, group);
        }
      }
    });
  });
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
