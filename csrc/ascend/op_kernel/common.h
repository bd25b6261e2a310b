// What the kernels share: arithmetic, and copies and vector operations of rows.
#pragma once

#include "kernel_operator.h"
#include "tiling_data.h"

namespace codellama_rt {
namespace ascend {

using namespace AscendC;

__aicore__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
__aicore__ inline int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }
__aicore__ inline int64_t divide_up(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Between two vector instructions of which the second uses what the first made.
__aicore__ inline void vector_barrier() { PipeBarrier<PIPE_V>(); }

// One row of 16-bit elements of any length, to and from the unified buffer.
template <typename T>
__aicore__ inline void load_row(const LocalTensor<T>& to, const GlobalTensor<T>& from,
                                int64_t count) {
  DataCopyPad(to, from, DataCopyExtParams(1, uint32_t(count * sizeof(T)), 0, 0, 0),
              DataCopyPadExtParams<T>());
}
template <typename T>
__aicore__ inline void store_row(const GlobalTensor<T>& to, const LocalTensor<T>& from,
                                 int64_t count) {
  DataCopyPad(to, from, DataCopyExtParams(1, uint32_t(count * sizeof(T)), 0, 0, 0));
}

// Of `num_heads` rows (head_dim) that lie together, each into its head's page: one DMA. `to` is the
// first head's row in the cache, whose heads are block_size rows apart.
template <typename T>
__aicore__ inline void store_heads(const GlobalTensor<T>& to, const LocalTensor<T>& from,
                                   int64_t num_heads, int64_t head_dim, int64_t block_size) {
  const uint32_t row = uint32_t(head_dim * sizeof(T));
  const uint32_t gap = uint32_t(block_size - 1) * row;
  DataCopyPad(to, from, DataCopyExtParams(uint16_t(num_heads), row, 0, gap, 0));
}

// rows[r] *= factors[r], each factor spread over a block; rows of `width` floats.
__aicore__ inline void multiply_rows(const LocalTensor<float>& rows,
                                     const LocalTensor<float>& factors, int64_t num_rows,
                                     int64_t width) {
  const uint8_t stride = uint8_t(width / kBlockFloats);
  for (int64_t c = 0; c < width; c += kVectorFloats) {
    Mul(rows[c], rows[c], factors, uint64_t(smaller(kVectorFloats, width - c)), uint8_t(num_rows),
        BinaryRepeatParams(1, 1, 0, stride, stride, 1));
  }
}

}  // namespace ascend
}  // namespace codellama_rt
