// The copy engine's description of a matrix of 16-bit elements, read in boxes of 64 columns that
// land swizzled: 16-byte piece c of row r lies at piece c ^ (r % 8) of its 128 bytes.
#pragma once

#include "cuda/runtime/ptx.cuh"

namespace codellama_rt {
namespace cuda {

constexpr int kBoxColumns = 64;  // 128 bytes: the widest that swizzle takes

ptx::TensorMap make_tensor_map(const void* memory, DType dtype, int64_t rows, int64_t columns,
                               int box_rows);

}  // namespace cuda
}  // namespace codellama_rt
