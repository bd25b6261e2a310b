// cuBLASLt for large products of 16-bit floats, where it is asked for and found at run time.
//
// Its sums have another order for every size of the problem, so a row's bits depend on how many
// rows there are: off by default. Loaded by name; nothing of it is needed to build.
#pragma once

#include <string>

#include "../ops.h"

namespace codellama_rt {
namespace cuda {
#pragma GCC visibility push(default)

// "" and from now on in use; or why not. An empty path: libcublasLt.so.13, .12, .11 as they are
// found.
std::string use_cublaslt(const std::string& path, void* workspace, size_t workspace_bytes);

#pragma GCC visibility pop

// False: not in use, or not for this; nothing was launched then.
bool cublaslt_linear(const LinearParams& p);

}  // namespace cuda
}  // namespace codellama_rt
