// Attention over caches of f16: what attention_launch.cuh is compiled for here.
#include "attention_launch.cuh"
#include "tensor_map.h"

namespace codellama_rt {
namespace cuda {
namespace {

// Rows that the copy engine may be asked for: pages are within a cache of unknown length.
constexpr int64_t kAnyRows = 0x7fffffff;

void make_maps(Attention& a, const AttentionShape& shape) {
  if (device().major != 9) return;
  const int64_t columns = (a.block_tables ? 1 : a.n_kv_heads) * shape.head_dim;
  a.box_rows = a.block_tables && a.block_size % kTile != 0 ? kCacheGroup : kTile;
  a.key_map = make_tensor_map(a.key, shape.cache_dtype, kAnyRows, columns, a.box_rows);
  a.value_map = make_tensor_map(a.value, shape.cache_dtype, kAnyRows, columns, a.box_rows);
}

}  // namespace

bool attend_f16(const Attention& a, const AttentionShape& shape) {
  if (shape.cache_dtype != DType::kFloat16) return false;
  if (shape.head_dim != 128 && shape.head_dim != 64) return false;
  Attention mapped = a;
  make_maps(mapped, shape);
  if (shape.head_dim == 64) {
    launch_attention<f16, FloatTile<f16, 64>, 64>(mapped, false);
  } else {
    launch_attention<f16, FloatTile<f16, 128>, 128>(mapped, attend_wgmma(mapped, shape));
  }
  return true;
}

}  // namespace cuda
}  // namespace codellama_rt
