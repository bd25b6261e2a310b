// Calls a callback as MindSpore does for an `ops.Custom` on an NPU: by two vectors of pointers.
#include <cstdint>
#include <vector>

using Callback = int (*)(void* function, std::vector<void*> inputs, std::vector<void*> outputs,
                         uint64_t* workspace_size, void** executor);

extern "C" __attribute__((visibility("default"))) int call_back(Callback callback, void* function,
                                                                void** inputs, int64_t num_inputs,
                                                                void** outputs, int64_t num_outputs,
                                                                uint64_t* workspace_size,
                                                                void** executor) {
  const std::vector<void*> in(inputs, inputs + num_inputs), out(outputs, outputs + num_outputs);
  return callback(function, in, out, workspace_size, executor);
}
