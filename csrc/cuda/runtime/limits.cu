// read_sum: memory read once, 16 bytes a thread at a time; no operator, but the roof of those that
//           only read
// Shapes   memory (bytes), a multiple of 16; out (1) float32, written so that nothing is left out
// Traffic  bytes, once each
// Limit    memory: what it reaches is called the read roof
// Tiling   8 loads in flight a thread, 8 blocks of 256 threads an SM
#include "cuda/runtime/common.cuh"

namespace codellama_rt {
namespace cuda {
namespace {

constexpr int kThreads = 256, kInFlight = 8, kBlocksPerSm = 8;

struct ReadParams {
  const uint4* memory;
  int64_t count;
  float* out;
};

__global__ void read_sum_kernel(const __grid_constant__ ReadParams p) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  uint32_t sum = 0;
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < p.count;
       i += step * kInFlight) {
    uint4 values[kInFlight] = {};
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      if (i + j * step < p.count) values[j] = p.memory[i + j * step];
    }
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
      sum ^= values[j].x ^ values[j].y ^ values[j].z ^ values[j].w;
    }
  }
  if (sum == 0x12345678) *p.out = 1;  // never taken out by the compiler, hardly ever done
}

}  // namespace

void read_sum(const void* memory, size_t bytes, float* out) {
  launch("read_sum", read_sum_kernel, dim3(device().num_sms * kBlocksPerSm), kThreads, 0,
         ReadParams{static_cast<const uint4*>(memory), int64_t(bytes / 16), out});
}

}  // namespace cuda
}  // namespace codellama_rt
