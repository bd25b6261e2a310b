// Where groups lie in memory and as they are multiplied; packed ones taken apart for many tokens.
#pragma once

#include "cpu/linear/formats.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

// A packed format, nibbles for example, whose groups are taken apart once for many tokens.
template <typename FormatOf>
struct Widened {
  using Packed = FormatOf;
  using From = typename Packed::Layout;
  using Layout =
      Unpacked<From::kBias, From::kHalves, From::kHasMinimum, From::kGroup, From::kShared>;
  static constexpr bool kInPlace = false;
};
template <typename Format>
constexpr bool kIsPacked =
    Format::kInPlace && Format::Layout::kBytes < Format::Layout::kGroup * kWeightTile;

template <typename Format>
inline void widen(const uint8_t* head, const uint8_t* group, uint8_t* to) {
  using From = typename Format::From;
  using Layout = typename Format::Layout;
  static_assert(sizeof(Bytes) == kPartBytes);
  for (int part = 0; part < kParts; ++part) {
    for (int q = 0; q < Layout::kGroup / 4; ++q) {
      const Bytes values = From::values(group, q, part);
      std::memcpy(to + q * kStepBytes + part * kPartBytes, &values, kPartBytes);
    }
    for (int half = 0; half < Layout::kHalves; ++half) {
      store(Layout::floats(to, half) + part * kLanes, From::scales(head, group, half, part));
    }
    if (Layout::kHasMinimum) {
      store(Layout::floats(to, Layout::kHalves) + part * kLanes, From::minima(head, group, part));
    }
  }
}

// Groups in memory and as they are multiplied.
template <typename Format>
struct Groups {
  static constexpr int64_t kBytes = Format::kInPlace ? Format::Layout::kBytes : 0;  // to fetch
  static const uint8_t* source(const Tile& tile, int64_t k, int64_t g) {
    return Format::kInPlace ? groups_of<Format>(tile, k, g, 0, nullptr) : nullptr;
  }
  static const uint8_t* load(const Tile& tile, int64_t k, int64_t g, int64_t count, uint8_t* to) {
    return groups_of<Format>(tile, k, g, count, to);
  }
};
template <typename Format>
struct Groups<Widened<Format>> : Groups<Format> {
  using Wide = Widened<Format>;
  static const uint8_t* load(const Tile& tile, int64_t k, int64_t g, int64_t count, uint8_t* to) {
    const uint8_t *head = head_of<Format>(tile, k), *group = Groups<Format>::source(tile, k, g);
    for (int64_t i = 0; i < count; ++i) {
      widen<Wide>(head, group + i * Wide::From::kBytes, to + i * Wide::Layout::kBytes);
    }
    return to;
  }
};

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
