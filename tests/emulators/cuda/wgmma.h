// The warpgroup's products of wgmma.cuh on the CPU, from the bits of the descriptor.
#pragma once

#include "ptx.h"

namespace codellama_rt {
namespace cuda {
namespace ptx {

inline uint32_t shared_address(const void* memory) {
  return uint32_t(static_cast<const unsigned char*>(memory) - emu::block().shared);
}
inline uint64_t descriptor(const void* memory, int leading, int stride) {
  const uint64_t address = shared_address(memory) >> 4 & 0x3fff;
  return address | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}
inline void wgmma_fence() {}
inline void wgmma_finish() {}
template <typename T, int kCount>
void hold(T (&)[kCount][4]) {}
template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

inline void named_wait(int barrier, int num_threads) {
  emu::arrive_and_wait(emu::block().barriers[barrier], num_threads);
}
inline void named_arrive(int barrier, int num_threads) {
  auto& b = emu::block().barriers[barrier];
  if (++b.arrived < num_threads) return;
  b.arrived = 0;
  ++b.generation;
  emu::made_progress();
}

// Element (k, n) of the second operand: the swizzle exchanges address bits 4-6 by bits 7-9.
template <typename T>
float operand(uint64_t descriptor, int k, int n, bool across_k) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4;
  const uint32_t leading = uint32_t(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  uint32_t address =
      start + (across_k ? n / 64 * leading + n % 64 * 2 + k / 8 * stride + k % 8 * 128
                        : n / 8 * stride + n % 8 * 128 + k * 2);
  address ^= (address >> 7 & 7) << 4;
  uint16_t bits;
  std::memcpy(&bits, emu::block().shared + address, 2);
  return to_float(T{bits});
}

struct RowFragments {
  float a[8];
};
template <typename T, int kFragments>
void warpgroup_product(float (&c)[kFragments][4], const uint32_t (&a)[4], uint64_t b, bool add,
                       bool across_k) {
  if (b >> 62 != 1) std::abort();
  RowFragments mine;
  for (int i = 0; i < 4; ++i) unpack<T>(a[i], mine.a + 2 * i);
  const auto* slots = emu::exchange(emu::warp(), emu::lane(), emu::kWarp, mine);
  const int g = emu::lane() / 4, t = emu::lane() % 4;
  for (int i = 0; i < kFragments; ++i) {
    for (int j = 0; j < 4; ++j) {
      double sum = add ? c[i][j] : 0;
      for (int k = 0; k < 16; ++k) {
        const auto& row = emu::slot<RowFragments>(slots, 4 * g + k % 8 / 2);
        const float x = row.a[4 * (k / 8) + j / 2 * 2 + k % 2];
        sum += double(x) * operand<T>(b, k, 8 * i + 2 * t + j % 2, across_k);
      }
      c[i][j] = float(sum);
    }
  }
}
template <typename T>
void wgmma_64(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  warpgroup_product<T>(c, a, b, add, false);
}
template <typename T>
void wgmma_128(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b, bool add) {
  warpgroup_product<T>(c, a, b, add, true);
}

}  // namespace ptx
}  // namespace cuda
}  // namespace codellama_rt
