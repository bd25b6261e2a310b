// Attention over caches of bf16 and f16, computed in that type: what launch.cuh is compiled for
// here.
#include "cuda/attention/launch.cuh"

namespace codellama_rt {
namespace cuda {
namespace {

// What the copy engine is told of keys and values. A box of paged ones lies within its page; of
// contiguous ones the last box may reach past the last row, and must not read there.
void make_maps(Attention& a, DType dtype) {
  const int64_t columns = (a.block_tables ? 1 : a.n_kv_heads) * kDim;
  const int64_t rows = a.num_keys > 0 ? a.num_keys : 1;
  a.box_rows = a.block_tables && a.block_size % kTile != 0 ? kCacheGroup : kTile;
  a.key_map = make_tensor_map(a.key, dtype, rows, columns, a.box_rows);
  a.value_map = make_tensor_map(a.value, dtype, rows, columns, a.box_rows);
}

template <typename T>
void launch_for(const Attention& a, const AttentionShape& shape) {
  attend_few<T, FloatTile<T>>(a);
  if (!attend_wgmma(a, shape)) attend_many<T, FloatTile<T>>(a);
}

}  // namespace

void attend_float(Attention a, const AttentionShape& shape) {
  if (device().bulk) make_maps(a, shape.cache_dtype);
  shape.dtype == DType::kBFloat16 ? launch_for<bf16>(a, shape) : launch_for<f16>(a, shape);
}

}  // namespace cuda
}  // namespace codellama_rt
