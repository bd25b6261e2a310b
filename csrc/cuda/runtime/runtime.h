// What the library asks of CUDA's runtime beside launching kernels: memory, copies, streams,
// graphs. runtime.cu calls CUDA; tests/emulators/cuda stands in for it on the CPU. Each throws
// std::runtime_error.
#pragma once

#include <cstddef>
#include <functional>
#include <string>

namespace codellama_rt {
#pragma GCC visibility push(default)
namespace cuda {

struct Device {
  int major, minor;  // compute capability
  int num_sms;
  size_t max_shared;  // bytes that a block can ask for
  bool bulk;          // kernels of sm_90a: copies by the bulk engine, wgmma
};
// Chooses `bulk`, and says why not where the image that the driver loaded, `image` of sm_80 or 90,
// has other kernels. CODELLAMA_RT_CUDA_COPIES=cp.async, for tests, asks a Hopper for sm_80's.
std::string choose_kernels(Device* device, int image);

std::string unavailable_reason();  // "": there is a device that these kernels run on
std::string device_name();
const Device& device();
void memory_info(size_t* free_bytes, size_t* total_bytes);

void* allocate(size_t bytes);
void release(void* memory);
void* allocate_pinned(size_t bytes);  // host memory that copies reach without a detour
void release_pinned(void* memory);

// The stream of this thread: all that follows, and every op, goes there. Null: CUDA's own.
void set_stream(void* stream);
void* stream();
void* create_stream();
void destroy_stream(void* stream);
void copy_async(void* to, const void* from, size_t bytes);
void fill_async(void* memory, int byte, size_t bytes);
void synchronize();  // the stream alone

void begin_capture();
void* end_capture();  // a graph, ready to launch
void launch_graph(void* graph);
void destroy_graph(void* graph);
double elapsed_ms(const std::function<void()>& work);  // of what it puts on the stream, by events

// Reads memory once, 16 bytes a thread at a time, and adds it up: the roof that decoding has.
void read_sum(const void* memory, size_t bytes, float* out);

// Memory for the partial results of attention, in use by one stream at a time; its first bytes are
// counters, zero between launches. Without it attention runs unsplit: the same bits, slowly.
struct Workspace {
  void* memory;
  size_t bytes;
};
constexpr int kTicketBytes = 1 << 20;
void set_workspace(void* memory, size_t bytes);
// The same for this thread alone, before that one; null: no longer.
void lend_workspace(void* memory, size_t bytes);
Workspace workspace();

// Warps of a block that decode over int8 and fp8: 4 of 6 stages each, or 8 of 3. The same bits.
void set_decode_warps(int warps);
int decode_warps();

}  // namespace cuda
#pragma GCC visibility pop
}  // namespace codellama_rt
