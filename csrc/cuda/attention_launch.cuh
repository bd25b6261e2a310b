// Launches of the kernels of attention_kernels.cuh.
#pragma once

#include "attention.h"
#include "attention_kernels.cuh"

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

}  // namespace cuda
}  // namespace codellama_rt
