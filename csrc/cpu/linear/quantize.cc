// quantize: a float weight to int8 or int4 with a scale for 64 or 32 elements along k
// Shapes   weight (n, k); payload: tiles of 16 rows of groups, as quantized.h says
// Traffic  n * k * itemsize bytes read, weight_bytes(n, k) written, once each
// Limit    arithmetic: int8 rounds every element 14 times; int4 reads a tile twice, from cache
// Tiling   a task takes tiles of 16 rows; kLanes rows at a time are transposed, so that a lane is a
//          row and nothing is summed across lanes
// Numerics no fused multiply-add: every instruction set and ops/reference.py give the same bytes.
//          int8: a group is rotated (rotation.h); of the scales bfloat16(max|w| / c), c from 124 to
//          130, that of least squared error; value = w / scale to nearest even, in -127..127.
//          int4: w = value * step + minimum, value in 0..15; step and minimum are 8-bit codes in
//          units of the row, the largest of its groups being 255 of them: 16 bits a group, as a
//          float16 scale takes, and half the error, for the grid may lie unevenly around zero.
//          A row with a NaN or an infinity gives NaN. What fills the last tile and, before its
//          rotation, the last group is zero
#include <limits>

#include "cpu/linear/formats.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// Below it 1 / scale would overflow: such a group becomes zeros.
constexpr float kSmallestScale = 0x1p-120f;

constexpr int kTrials = 13;  // of int8 scales
constexpr float kFirstTrial = 124.0f;

template <typename Layout>
struct Columns {
  Vec at[Layout::kGroup];  // element i of kLanes rows
};

// Rows [row, row + kLanes) and elements [k, k + kGroup) of the weight, zero outside it.
template <typename T, typename Layout>
void load_columns(const QuantizeParams& p, int64_t row, int64_t k, Columns<Layout>& columns) {
  const T* weight = static_cast<const T*>(p.weight);
  for (int i = 0; i < Layout::kGroup; i += kLanes) {
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

// NaN where a row has an element that is not finite, else 0.
template <typename Layout>
inline Vec not_finite(const Columns<Layout>& columns) {
  Vec poison = splat(0.0f);
  for (const Vec& column : columns.at) poison = poison + (column - column);
  return poison;
}

// x rounded to nearest even, in [low, high]; NaN becomes low.
inline Vec nearest(Vec x, float low, float high) {
  return min(splat(high), max(round(x), splat(low)));
}

// A byte of each lane, every `stride` bytes.
inline void put_bytes(Vec x, int bias, uint8_t* to, int64_t stride) {
  float lanes[kLanes];
  store(lanes, x);
  for (int r = 0; r < kLanes; ++r) to[r * stride] = uint8_t(int(lanes[r]) + bias);
}

// Of the scales that put the largest element at 124 to 130, the one of least squared error.
inline Vec int8_scale(const Columns<Int8Layout>& columns) {
  Vec most = splat(0.0f);
  for (const Vec& w : columns.at) most = max(max(w, splat(0.0f) - w), most);
  const Vec unit = inverse(most);  // squares of w itself would vanish or overflow
  float best[kLanes], scales[kLanes] = {};
  for (float& lane : best) lane = std::numeric_limits<float>::infinity();
  for (int trial = 0; trial < kTrials; ++trial) {
    const Vec scale = rounded_to_bf16(most / splat(kFirstTrial + 0.5f * float(trial)));
    const Vec factor = inverse(scale);
    Vec squares = splat(0.0f);
    for (const Vec& w : columns.at) {
      const Vec error = (w - nearest(w * factor, -127.0f, 127.0f) * scale) * unit;
      squares = squares + error * error;
    }
    float errors[kLanes], lanes[kLanes];
    store(errors, squares);
    store(lanes, scale);
    for (int i = 0; i < kLanes; ++i) {
      if (errors[i] < best[i]) best[i] = errors[i], scales[i] = lanes[i];
    }
  }
  return load(scales);
}

// kLanes rows of a tile, from its row `lane` on: one scale a group.
template <typename T>
void rows_to_int8(const QuantizeParams& p, int64_t tile, int lane, uint8_t* group) {
  for (int64_t k = 0; k < p.k; k += Int8Layout::kGroup, group += Int8Layout::kBytes) {
    Columns<Int8Layout> columns;
    load_columns<T>(p, tile * kWeightTile + lane, k, columns);
    add_and_subtract(columns.at, Int8Layout::kGroup, Int8Layout::kGroup);
    for (Vec& w : columns.at) w = w * splat(0.125f);
    const Vec scale = int8_scale(columns) + not_finite(columns);
    const Vec factor = inverse(scale);
    for (int i = 0; i < Int8Layout::kGroup; ++i) {
      put_bytes(nearest(columns.at[i] * factor, -127.0f, 127.0f), Int8Layout::kBias,
                group + i / 4 * kStepBytes + lane * 4 + i % 4, 4);
    }
    store(reinterpret_cast<bf16*>(group + Int8Layout::kValuesBytes) + lane, scale);
  }
}

struct Range {
  Vec step, depth;  // of a group: (max - min) / 15 and -min, zero being between the two
};

// The ranges of the groups of kLanes rows, and the largest of each.
template <typename T>
Range find_ranges(const QuantizeParams& p, int64_t row, Range* ranges) {
  Range most = {splat(0.0f), splat(0.0f)};
  Vec poison = splat(0.0f);
  for (int64_t k = 0; k < p.k; k += Int4Layout::kGroup) {
    Columns<Int4Layout> columns;
    load_columns<T>(p, row, k, columns);
    Vec low = splat(0.0f), high = splat(0.0f);
    for (const Vec& w : columns.at) low = min(w, low), high = max(w, high);
    const Vec step = high / splat(15.0f) - low / splat(15.0f), depth = splat(0.0f) - low;
    ranges[k / Int4Layout::kGroup] = {step, depth};
    most = {max(step, most.step), max(depth, most.depth)};
    poison = poison + not_finite(columns);
  }
  return {most.step + poison, most.depth + poison};
}

// kLanes rows of a tile: of each group, codes of its step and depth in units of the row.
template <typename T>
void rows_to_int4(const QuantizeParams& p, int64_t tile, int lane, uint8_t* head) {
  const int64_t row = tile * kWeightTile + lane;
  auto* ranges =
      static_cast<Range*>(scratch(Scratch::kTask, num_groups<Int4Layout>(p.k) * sizeof(Range)));
  const Range most = find_ranges<T>(p, row, ranges);
  const Vec step_unit = most.step / splat(255.0f), depth_unit = most.depth / splat(255.0f);
  store(reinterpret_cast<float*>(head) + lane, step_unit);
  store(reinterpret_cast<float*>(head) + kWeightTile + lane, splat(0.0f) - depth_unit);
  const Vec step_factor = inverse(step_unit), depth_factor = inverse(depth_unit);
  uint8_t* group = head + Int4Layout::kHeadBytes;
  constexpr int kHalf = Int4Layout::kGroup / 2;
  for (int64_t k = 0; k < p.k; k += Int4Layout::kGroup, group += Int4Layout::kBytes) {
    const Range& range = ranges[k / Int4Layout::kGroup];
    const Vec step = nearest(range.step * step_factor, 0.0f, 255.0f);
    const Vec depth = nearest(range.depth * depth_factor, 0.0f, 255.0f);
    put_bytes(step, 0, group + Int4Layout::kCodes + lane, 1);
    put_bytes(depth, 0, group + Int4Layout::kCodes + kWeightTile + lane, 1);
    const Vec factor = inverse(step * step_unit), minimum = depth * depth_unit;
    Columns<Int4Layout> columns;
    load_columns<T>(p, row, k, columns);
    for (int i = 0; i < kHalf; ++i) {
      const Vec low = nearest((columns.at[i] + minimum) * factor, 0.0f, 15.0f);
      const Vec high = nearest((columns.at[i + kHalf] + minimum) * factor, 0.0f, 15.0f);
      put_bytes(low + high * splat(16.0f), 0, group + i / 4 * kStepBytes + lane * 4 + i % 4, 4);
    }
  }
}

}  // namespace

void quantize(const QuantizeParams& p) {
  const int64_t tile_bytes = weight_bytes(p.dtype, kWeightTile, p.k);
  if (p.k == 0) return;
  for_each_row(ceil_div(p.n, kWeightTile), tile_bytes, [&](int64_t tile) {
    with_type(p.weight_dtype, [&](auto weight) {
      using T = decltype(weight);
      uint8_t* to = static_cast<uint8_t*>(p.payload) + tile * tile_bytes;
      for (int lane = 0; lane < kWeightTile; lane += kLanes) {
        p.dtype == DType::kInt8 ? rows_to_int8<T>(p, tile, lane, to)
                                : rows_to_int4<T>(p, tile, lane, to);
      }
    });
  });
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
