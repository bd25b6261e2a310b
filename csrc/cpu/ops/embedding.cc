// embedding: out[t] = table[token_ids[t]]
// Shapes   token_ids (num_tokens); table (vocab_size, dim); out (num_tokens, dim)
// Traffic  num_tokens * dim * (table itemsize + out itemsize) bytes, once each; of a table in
//          tiles, whose rows are interleaved by 16, 16 times that
// Limit    memory
// Tiling   rows in groups of 32 KiB
// Numerics a conversion: exact when out is no narrower than the table. Of a quantised table
//          (value - bias) * scale + minimum, each step rounded to float32; of int8, rotated back
#include "cpu/linear/formats.h"
#include "ops.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

constexpr int64_t kChunk = 256;  // elements: whole blocks of any format

// A group's elements of row `row` of a tile.
template <typename Layout>
void dequantize_group(const uint8_t* head, const uint8_t* group, int row, float* to) {
  for (int half = 0; half < Layout::kHalves; ++half) {
    const float scale = Layout::scale(head, group, half, row);
    const float minimum = Layout::kHasMinimum ? Layout::minimum(head, group, row) : 0.0f;
    const int end = (half + 1) * Layout::kGroup / Layout::kHalves;
    for (int i = half * Layout::kGroup / Layout::kHalves; i < end; ++i) {
      const float product = float(int(Layout::value(group, i, row)) - Layout::kBias) * scale;
      to[i] = Layout::kHasMinimum ? product + minimum : product;
    }
  }
}

template <typename Format>
void embed_quantized(const EmbeddingParams& p) {
  using Layout = typename Format::Layout;
  const auto* table = static_cast<const uint8_t*>(p.table);
  for_each_row(p.num_tokens, p.dim * item_size(p.out_dtype), [&](int64_t t) {
    const int64_t id = p.token_ids[t], first = id / kWeightTile * kWeightTile;
    // Of rows of GGUF's blocks the row alone, as a tile of one; other formats have tiles of 16.
    const Tile tile = Format::kInPlace ? Tile{table, first, kWeightTile} : Tile{table, id, 1};
    const uint8_t* head = head_of<Format>(tile, p.dim);
    const int row = Format::kInPlace ? int(id - first) : 0;
    for (int64_t k = 0; k < p.dim; k += kChunk) {
      constexpr int64_t kGroup = Layout::kGroup;
      alignas(64) uint8_t unpacked[Format::kInPlace ? 1 : kChunk / kGroup * Layout::kBytes];
      float floats[kChunk];
      const int64_t elements = smaller(p.dim - k, kChunk), groups = num_groups<Layout>(elements);
      const uint8_t* group = groups_of<Format>(tile, p.dim, k / kGroup, groups, unpacked);
      for (int64_t g = 0; g < groups; ++g) {
        dequantize_group<Layout>(head, group + g * Layout::kBytes, row, floats + g * kGroup);
        if (Layout::kRotated) rotate(floats + g * kGroup, kGroup, kQueryRotation);
      }
      with_type(p.out_dtype, [&](auto out) {
        convert(floats, static_cast<decltype(out)*>(p.out) + t * p.dim + k, elements);
      });
    }
  });
}

}  // namespace

void embedding(const EmbeddingParams& p) {
  if (!is_float(p.table_dtype)) {
    return with_format(p.table_dtype, [&](auto format) { embed_quantized<decltype(format)>(p); });
  }
  with_type(p.table_dtype, [&](auto table_type) {
    with_type(p.out_dtype, [&](auto out_type) {
      const auto* table = static_cast<const decltype(table_type)*>(p.table);
      auto* out = static_cast<decltype(out_type)*>(p.out);
      for_each_row(p.num_tokens, p.dim * item_size(p.out_dtype), [&](int64_t t) {
        convert(table + p.token_ids[t] * p.dim, out + t * p.dim, p.dim);
      });
    });
  });
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
