// The part of CUDA that the kernels use, on the CPU: so that their indexing, scheduling and
// arithmetic are tested where there is no GPU. Included instead of the CUDA headers.
//
// A thread of a block is a fiber; blocks run one after another. A fiber runs until it waits: at a
// barrier, at an exchange of its warp, at an mbarrier. Asynchronous copies arrive as late as they
// may (when somebody waits for them), and until then their destination holds NaN: a kernel that
// reads too early or overwrites too soon gives wrong numbers. What it cannot show: races between
// blocks, the memory model, timing, and whether an instruction's operands are encoded right.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

namespace codellama_rt {
namespace emu {

constexpr int kWarp = 32, kWarpgroup = 128, kMaxThreads = 1024, kSlotBytes = 64;

// What threads that arrive together show each other. Two sets of slots take turns: who writes the
// next one has seen everybody leave the last but one.
struct Collective {
  int arrived = 0;
  uint64_t generation = 0;
  alignas(16) unsigned char slots[2][kWarpgroup][kSlotBytes];
};

struct Thread {
  dim3 index;
  int number;
};

struct Block {
  dim3 index, dim, grid;
  int num_threads;
  unsigned char* shared;
  Collective warps[kMaxThreads / kWarp], warpgroups[kMaxThreads / kWarpgroup];
  Collective barriers[16];
};

Thread& thread();
Block& block();
void yield();  // lets the others run; throws if nobody gets anywhere
void made_progress();

// Everyone's value, once all `size` have arrived.
template <typename T>
const T& slot(const unsigned char (*slots)[kSlotBytes], int lane) {
  return *reinterpret_cast<const T*>(slots[lane]);
}
inline void arrive_and_wait(Collective& c, int size) {
  const uint64_t generation = c.generation;
  if (++c.arrived == size) {
    c.arrived = 0;
    ++c.generation;
    made_progress();
    return;
  }
  while (c.generation == generation) yield();
}
template <typename T>
const unsigned char (*exchange(Collective& c, int lane, int size, const T& mine)) [kSlotBytes] {
  static_assert(sizeof(T) <= kSlotBytes, "a slot is too small");
  auto* slots = c.slots[c.generation & 1];
  std::memcpy(slots[lane], &mine, sizeof(T));
  arrive_and_wait(c, size);
  return slots;
} inline int lane() {
  return thread().number % kWarp;
}
inline Collective& warp() { return block().warps[thread().number / kWarp]; }
inline Collective& warpgroup() { return block().warpgroups[thread().number / kWarpgroup]; }

// Runs (or, while a graph is captured, notes) one kernel.
void launch(std::function<void()> kernel, dim3 grid, int num_threads, size_t shared_bytes);
// Runs or notes anything else that a stream does.
void enqueue(std::function<void()> work);

}  // namespace emu
}  // namespace codellama_rt

#define threadIdx (::codellama_rt::emu::thread().index)
#define blockIdx (::codellama_rt::emu::block().index)
#define blockDim (::codellama_rt::emu::block().dim)
#define gridDim (::codellama_rt::emu::block().grid)

inline void __syncthreads() {
  using namespace codellama_rt::emu;
  arrive_and_wait(block().barriers[0], block().num_threads);
}
inline void __syncwarp() {
  using namespace codellama_rt::emu;
  exchange(warp(), lane(), kWarp, 0);
}
template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  using namespace codellama_rt::emu;
  return slot<T>(exchange(warp(), lane(), kWarp, value), source & 31);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  using namespace codellama_rt::emu;
  return slot<T>(exchange(warp(), lane(), kWarp, value), lane() ^ mask);
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int by) {
  using namespace codellama_rt::emu;
  return slot<T>(exchange(warp(), lane(), kWarp, value), lane() < by ? lane() : lane() - by);
}
inline unsigned __ballot_sync(unsigned, bool value) {
  using namespace codellama_rt::emu;
  const auto* slots = exchange(warp(), lane(), kWarp, value);
  unsigned votes = 0;
  for (int i = 0; i < kWarp; ++i) votes |= unsigned(slot<bool>(slots, i)) << i;
  return votes;
}
inline bool __any_sync(unsigned lanes, bool value) { return __ballot_sync(lanes, value) != 0; }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline void __threadfence() {}
inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
