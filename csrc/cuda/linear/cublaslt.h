// cuBLASLt for large products of 16-bit floats, where it is asked for and found at run time.
//
// Its sums have an order of their own, so a row's bits depend on whether up to 32 tokens or more
// are multiplied: off by default. Loaded by name; nothing of it is needed to build.
#pragma once

#include <string>

#include "ops.h"

namespace codellama_rt {
namespace cuda {
#pragma GCC visibility push(default)

// "" and from now on in use; or why not. An empty path: libcublasLt.so.13, .12, .11 as they are
// found.
std::string use_cublaslt(const std::string& path, void* workspace, size_t workspace_bytes);
void leave_cublaslt();

#pragma GCC visibility pop

// False: not in use, or not for this; nothing was launched then.
bool cublaslt_linear(const LinearParams& p);

}  // namespace cuda
}  // namespace codellama_rt
