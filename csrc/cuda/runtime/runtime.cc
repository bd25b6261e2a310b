// What the runtime keeps of its own, on a device as in the emulator.
#include "cuda/runtime/runtime.h"

namespace codellama_rt {
namespace cuda {
namespace {

thread_local void* current_stream = nullptr;
Workspace current_workspace{nullptr, 0};

}  // namespace

void set_stream(void* stream) { current_stream = stream; }
void* stream() { return current_stream; }

void set_workspace(void* memory, size_t bytes) {
  if (memory) fill_async(memory, 0, bytes);
  current_workspace = {memory, memory ? bytes : 0};
}
Workspace workspace() { return current_workspace; }

}  // namespace cuda
}  // namespace codellama_rt
