// CUDA's runtime behind runtime.h. Linked statically; without a driver every call says so.
#include <cuda_runtime.h>

#include <memory>
#include <stdexcept>

#include "cuda/runtime/runtime.h"

namespace codellama_rt {
namespace cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // what is reported once is not reported again by the next call
  throw std::runtime_error(std::string("cuda: ") + what + ": " + cudaGetErrorString(error));
}

// Compiled like every kernel: what the driver loads for it, it loads for all.
__global__ void image_kernel() {}

cudaStream_t current() { return static_cast<cudaStream_t>(stream()); }

struct Probe {
  std::string reason, name;
  Device device{};

  Probe() {
    int count = 0, ordinal = 0;
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess && count > 0) error = cudaGetDevice(&ordinal);
    cudaDeviceProp properties;
    if (error == cudaSuccess && count > 0) error = cudaGetDeviceProperties(&properties, ordinal);
    cudaFuncAttributes attributes{};
    if (error == cudaSuccess && count > 0 && properties.major >= 8) {
      error = cudaFuncGetAttributes(&attributes, image_kernel);
    }
    if (error != cudaSuccess || count == 0) {
      cudaGetLastError();
      reason = std::string("no CUDA device: ") +
               (error == cudaSuccess ? "none is visible" : cudaGetErrorString(error));
      return;
    }
    name = std::string(properties.name) + ", compute capability " +
           std::to_string(properties.major) + "." + std::to_string(properties.minor);
    device = {properties.major, properties.minor, properties.multiProcessorCount,
              properties.sharedMemPerBlockOptin, false};
    if (properties.major < 8) {
      reason = name + ": these kernels need 8.0 or more";
      return;
    }
    // Of what was compiled, not of what it became: CUDA_FORCE_PTX_JIT makes code for 9.0 from 8.0.
    const std::string fault = choose_kernels(&device, attributes.ptxVersion);
    if (!fault.empty()) reason = name + ": " + fault;
  }
};

const Probe& probe() {
  static const auto* found = new Probe;  // for threads that are still inside when the process exits
  return *found;
}

}  // namespace

std::string unavailable_reason() { return probe().reason; }
std::string device_name() { return probe().name; }
const Device& device() {
  if (!probe().reason.empty()) throw std::runtime_error(probe().reason);
  return probe().device;
}

void memory_info(size_t* free_bytes, size_t* total_bytes) {
  check(cudaMemGetInfo(free_bytes, total_bytes), "cudaMemGetInfo");
}

void* allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "cudaMalloc");
  return memory;
}
void release(void* memory) { check(cudaFree(memory), "cudaFree"); }
void* allocate_pinned(size_t bytes) {
  void* memory = nullptr;
  check(cudaMallocHost(&memory, bytes), "cudaMallocHost");
  return memory;
}
void release_pinned(void* memory) { check(cudaFreeHost(memory), "cudaFreeHost"); }

void* create_stream() {
  cudaStream_t made = nullptr;
  check(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking), "cudaStreamCreate");
  return made;
}
void destroy_stream(void* made) {
  check(cudaStreamDestroy(static_cast<cudaStream_t>(made)), "cudaStreamDestroy");
}
void copy_async(void* to, const void* from, size_t bytes) {
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, current()), "cudaMemcpyAsync");
}
void fill_async(void* memory, int byte, size_t bytes) {
  check(cudaMemsetAsync(memory, byte, bytes, current()), "cudaMemsetAsync");
}
void synchronize() { check(cudaStreamSynchronize(current()), "cudaStreamSynchronize"); }

void begin_capture() {
  check(cudaStreamBeginCapture(current(), cudaStreamCaptureModeThreadLocal), "begin capture");
}
void* end_capture() {
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(current(), &graph), "end capture");
  cudaGraphExec_t executable = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&executable, graph, 0);
  cudaGraphDestroy(graph);
  check(error, "cudaGraphInstantiate");
  return executable;
}
void launch_graph(void* graph) {
  check(cudaGraphLaunch(static_cast<cudaGraphExec_t>(graph), current()), "cudaGraphLaunch");
}
void destroy_graph(void* graph) {
  check(cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(graph)), "cudaGraphExecDestroy");
}

double elapsed_ms(const std::function<void()>& work) {
  cudaEvent_t events[2];
  for (cudaEvent_t& event : events) check(cudaEventCreate(&event), "cudaEventCreate");
  check(cudaEventRecord(events[0], current()), "cudaEventRecord");
  work();
  check(cudaEventRecord(events[1], current()), "cudaEventRecord");
  check(cudaEventSynchronize(events[1]), "cudaEventSynchronize");
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, events[0], events[1]), "cudaEventElapsedTime");
  for (cudaEvent_t event : events) cudaEventDestroy(event);
  return milliseconds;
}

}  // namespace cuda
}  // namespace codellama_rt
