// Launches of the kernels of kernels.cuh.
#pragma once

#include "cuda/attention/attention.h"
#include "cuda/attention/kernels.cuh"
#include "cuda/runtime/tensor_map.h"

namespace codellama_rt {
namespace cuda {

// Built for sm_80 and for Hopper from the same text; each has its own way of copying. In the
// other's image there is nothing to run, and a kernel that returned would pass for a result.
template <typename T, typename Tile, bool kBulk>
__global__ void __launch_bounds__(Tile::kWorkers* kWarp, 1)
    attend_split_kernel(const __grid_constant__ Attention a) {
  if constexpr (ptx::kBuilds<kBulk>) {
    attend_split<T, Tile, kBulk>(a);
  } else {
    ptx::trap();
  }
}
template <typename T, typename Tile, bool kBulk>
__global__ void __launch_bounds__(kTeamThreads, 2)
    attend_unsplit_kernel(const __grid_constant__ Attention a) {
  if constexpr (ptx::kBuilds<kBulk>) {
    attend_unsplit<T, Tile, kBulk>(a);
  } else {
    ptx::trap();
  }
}

template <typename T, typename Tile, bool kBulk>
void launch_split(const Attention& a) {
  constexpr size_t kBytes = Ring<Tile, kBulk, 1>::kBytes;
  int workers = Tile::kWorkers;
  while (workers > 1 && workers * kBytes > device().max_shared) --workers;
  launch("attention", attend_split_kernel<T, Tile, kBulk>, dim3(device().num_sms), workers * kWarp,
         workers * kBytes, a);
}
template <typename T, typename Tile, bool kBulk>
void launch_unsplit(const Attention& a) {
  constexpr size_t kBytes = Ring<Tile, kBulk, kTeamWarps>::kBytes +
                            SharedTotal<kTeamThreads>::kFloats * kTeamThreads * sizeof(float) +
                            sizeof(Segment);
  launch("attention", attend_unsplit_kernel<T, Tile, kBulk>, unsplit_grid(a, kTeamRows),
         kTeamThreads, kBytes, a);
}

template <typename T, typename Tile>
void attend_few(const Attention& a) {
  if (!a.partials) return;
  device().bulk ? launch_split<T, Tile, true>(a) : launch_split<T, Tile, false>(a);
}
template <typename T, typename Tile>
void attend_many(const Attention& a) {
  if (a.all_split) return;
  device().bulk ? launch_unsplit<T, Tile, true>(a) : launch_unsplit<T, Tile, false>(a);
}

// What the copy engine is told of keys and values. A box of paged ones lies within its page; of
// contiguous ones the last box may reach past the last row, and must not read there.
inline void make_maps(Attention& a, const AttentionShape& shape) {
  const int64_t columns = (a.block_tables ? 1 : a.n_kv_heads) * kDim;
  const int64_t rows = a.num_keys > 0 ? a.num_keys : 1;
  a.box_rows = a.block_tables && a.block_size % kTile != 0 ? kCacheGroup : kTile;
  a.key_map = make_tensor_map(a.key, shape.cache_dtype, rows, columns, a.box_rows);
  a.value_map = make_tensor_map(a.value, shape.cache_dtype, rows, columns, a.box_rows);
}

// Over a cache in the queries' own 16-bit type.
template <typename T>
void attend_float(const Attention& a, const AttentionShape& shape) {
  Attention mapped = a;
  if (device().bulk) make_maps(mapped, shape);
  attend_few<T, FloatTile<T>>(mapped);
  if (!attend_wgmma(mapped, shape)) attend_many<T, FloatTile<T>>(mapped);
}

}  // namespace cuda
}  // namespace codellama_rt
