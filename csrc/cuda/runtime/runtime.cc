// What the runtime keeps of its own, on a device as in the emulator.
#include "cuda/runtime/runtime.h"

#include <cstdlib>
#include <stdexcept>

namespace codellama_rt {
namespace cuda {
namespace {

thread_local void* current_stream = nullptr;
thread_local Workspace lent{nullptr, 0};
Workspace current_workspace{nullptr, 0};
int current_decode_warps = 4;

Workspace cleared(void* memory, size_t bytes) {
  if (bytes <= kTicketBytes) return {nullptr, 0};
  fill_async(memory, 0, kTicketBytes);
  return {memory, bytes};
}

}  // namespace

void set_stream(void* stream) { current_stream = stream; }
void* stream() { return current_stream; }

std::string choose_kernels(Device* device, int image) {
  const char* asked = std::getenv("CODELLAMA_RT_CUDA_COPIES");
  const std::string copies = asked ? asked : "";
  if (copies != "" && copies != "cp.async") {
    return "CODELLAMA_RT_CUDA_COPIES must be cp.async or not set, got " + copies;
  }
  device->bulk = device->major == 9 && copies.empty();
  if (device->bulk == (image >= 90)) return "";
  if (device->bulk) {
    return "the driver loaded kernels of sm_80, which this GPU's sm_90a replace; unset "
           "CUDA_FORCE_PTX_JIT, or build the library for sm_90a";
  }
  return "CODELLAMA_RT_CUDA_COPIES=cp.async needs CUDA_FORCE_PTX_JIT=1, set before the start";
}

void set_workspace(void* memory, size_t bytes) { current_workspace = cleared(memory, bytes); }
void lend_workspace(void* memory, size_t bytes) { lent = cleared(memory, bytes); }
Workspace workspace() { return lent.memory ? lent : current_workspace; }

void set_decode_warps(int warps) {
  if (warps != 4 && warps != 8) throw std::invalid_argument("decode warps must be 4 or 8");
  current_decode_warps = warps;
}
int decode_warps() { return current_decode_warps; }

}  // namespace cuda
}  // namespace codellama_rt
