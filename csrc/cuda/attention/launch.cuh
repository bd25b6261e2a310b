// Launches of the kernels of kernels.cuh.
#pragma once

#include "cuda/attention/attention.h"
#include "cuda/attention/kernels.cuh"
#include "cuda/runtime/tensor_map.h"

namespace codellama_rt {
namespace cuda {

constexpr int kWorkers = 4;  // warps a block: with 48 KiB each they fill an SM's shared memory

// Built for sm_80 and for Hopper from the same text; each has its own way of copying.
template <typename T, typename Tile, int kDim, bool kBulk>
__global__ void __launch_bounds__(kWorkers* kWarp, 1)
    attend_split_kernel(const __grid_constant__ Attention a) {
  if constexpr (ptx::kBuilds<kBulk>) attend_split<T, Tile, kDim, kBulk>(a);
}
template <typename T, typename Tile, int kDim, bool kBulk>
__global__ void __launch_bounds__(kTeamThreads, 2)
    attend_unsplit_kernel(const __grid_constant__ Attention a) {
  if constexpr (ptx::kBuilds<kBulk>) attend_unsplit<T, Tile, kDim, kBulk>(a);
}

// Rows of a batch in blocks of `rows`: as many blocks as there can be.
inline dim3 unsplit_grid(const Attention& a, int rows) {
  const int64_t group = a.n_heads / a.n_kv_heads;
  return dim3(a.num_tokens * group / rows + a.num_seqs, a.n_kv_heads);
}

template <typename T, typename Tile, int kDim, bool kBulk>
void launch_split(const Attention& a) {
  constexpr size_t kBytes = Ring<Tile, kDim, kBulk, 1>::kBytes;
  int workers = kWorkers;
  while (workers > 1 && workers * kBytes > device().max_shared) --workers;
  launch("attention", attend_split_kernel<T, Tile, kDim, kBulk>, dim3(device().num_sms),
         workers * kWarp, workers * kBytes, a);
}
template <typename T, typename Tile, int kDim, bool kBulk>
void launch_unsplit(const Attention& a) {
  constexpr size_t kBytes =
      Ring<Tile, kDim, kBulk, kTeamWarps>::kBytes +
      SharedTotal<kDim, kTeamThreads>::kFloats * kTeamThreads * sizeof(float) + sizeof(Segment);
  launch("attention", attend_unsplit_kernel<T, Tile, kDim, kBulk>, unsplit_grid(a, kTeamRows),
         kTeamThreads, kBytes, a);
}

template <typename T, typename Tile, int kDim>
void launch_attention(const Attention& a, bool unsplit_is_wgmma) {
  const bool bulk = device().major == 9;
  if (a.partials) {
    bulk ? launch_split<T, Tile, kDim, true>(a) : launch_split<T, Tile, kDim, false>(a);
  }
  const bool all_split = a.partials && !a.few_too && a.num_tokens <= a.few_queries;
  if (all_split || unsplit_is_wgmma) return;
  bulk ? launch_unsplit<T, Tile, kDim, true>(a) : launch_unsplit<T, Tile, kDim, false>(a);
}

// What the copy engine is told of keys and values. A box of paged ones lies within its page; of
// contiguous ones the last box may reach past the last row, and must not read there.
inline void make_maps(Attention& a, const AttentionShape& shape) {
  constexpr int64_t kAnyRows = 0x7fffffff;  // pages are within a cache of unknown length
  const int64_t columns = (a.block_tables ? 1 : a.n_kv_heads) * shape.head_dim;
  const int64_t rows = a.block_tables ? kAnyRows : a.num_keys > 0 ? a.num_keys : 1;
  a.box_rows = a.block_tables && a.block_size % kTile != 0 ? kCacheGroup : kTile;
  a.key_map = make_tensor_map(a.key, shape.cache_dtype, rows, columns, a.box_rows);
  a.value_map = make_tensor_map(a.value, shape.cache_dtype, rows, columns, a.box_rows);
}

// Over a cache in the queries' own 16-bit type.
template <typename T>
bool attend_float(const Attention& a, const AttentionShape& shape) {
  if (shape.head_dim != 128 && shape.head_dim != 64) return false;
  Attention mapped = a;
  if (device().major == 9) make_maps(mapped, shape);
  if (shape.head_dim == 64) {
    launch_attention<T, FloatTile<T, 64>, 64>(mapped, false);
  } else {
    launch_attention<T, FloatTile<T, 128>, 128>(mapped, attend_wgmma(mapped, shape));
  }
  return true;
}

}  // namespace cuda
}  // namespace codellama_rt
