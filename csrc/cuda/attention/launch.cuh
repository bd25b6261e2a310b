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

}  // namespace cuda
}  // namespace codellama_rt
