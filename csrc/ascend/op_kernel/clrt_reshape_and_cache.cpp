// reshape_and_cache: key_cache[slot] = key; value_cache[slot] = value   (PagedAttention,
//                    arXiv:2309.06180)
// Shapes   key, value (T, K, D), caches (blocks, K, block_size, D) in a 16-bit type; slots (T)
// int32 Traffic  8 * K * D bytes a token (33 kB at 32 heads of 128): each row read and written once
// Limit    memory; no arithmetic
// Tiling   one task = (token, chunk of key or value heads), one DMA in and one out; chunks shrink
//          until every core has a task
// Numerics copies: the bits are those given, whatever they stand for
#include "common.h"

namespace codellama_rt {
namespace ascend {

class ReshapeAndCache {
 public:
  __aicore__ inline void init(GM_ADDR key, GM_ADDR value, GM_ADDR key_cache, GM_ADDR value_cache,
                              GM_ADDR slots, const ReshapeAndCacheTiling* tiling) {
    t_ = tiling;
    key_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(key));
    value_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(value));
    key_cache_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(key_cache));
    value_cache_.SetGlobalBuffer(reinterpret_cast<__gm__ half*>(value_cache));
    slots_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(slots));
    pipe_.InitBuffer(passing_, 2, uint32_t(t_->chunk_heads * t_->head_dim * sizeof(half)));
  }

  __aicore__ inline void process() {
    const int64_t core = GetBlockIdx();
    const int64_t chunks = divide_up(t_->n_kv_heads, t_->chunk_heads);
    for (int64_t task = t_->tasks.first[core]; task < t_->tasks.first[core + 1]; ++task) {
      const int64_t token = task / (2 * chunks), chunk = task % (2 * chunks);
      const int64_t head = chunk % chunks * t_->chunk_heads;
      if (chunk < chunks) {
        copy(key_cache_, key_, token, head);
      } else {
        copy(value_cache_, value_, token, head);
      }
    }
  }

 private:
  __aicore__ inline void copy(const GlobalTensor<half>& cache, const GlobalTensor<half>& from,
                              int64_t token, int64_t head) {
    const int64_t slot = slots_.GetValue(token);
    if (slot < 0) return;
    const int64_t count = smaller(t_->chunk_heads, t_->n_kv_heads - head);
    LocalTensor<half> rows = passing_.AllocTensor<half>();
    DataCopy(rows, from[(token * t_->n_kv_heads + head) * t_->head_dim],
             uint32_t(count * t_->head_dim));
    passing_.EnQue(rows);
    rows = passing_.DeQue<half>();
    const int64_t page = slot / t_->block_size * t_->n_kv_heads + head;
    const int64_t row = page * t_->block_size + slot % t_->block_size;
    store_heads(cache[row * t_->head_dim], rows, count, t_->head_dim, t_->block_size);
    passing_.FreeTensor(rows);
  }

  const ReshapeAndCacheTiling* t_;
  TPipe pipe_;
  TQueBind<TPosition::VECIN, TPosition::VECOUT, 2> passing_;
  GlobalTensor<half> key_, value_, key_cache_, value_cache_;
  GlobalTensor<int32_t> slots_;
};

}  // namespace ascend
}  // namespace codellama_rt

extern "C" __global__ __aicore__ void clrt_reshape_and_cache(
    GM_ADDR key, GM_ADDR value, GM_ADDR key_cache, GM_ADDR value_cache, GM_ADDR slot_mapping,
    GM_ADDR key_cache_out, GM_ADDR value_cache_out, GM_ADDR workspace, GM_ADDR tiling) {
  using namespace codellama_rt::ascend;
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  REGISTER_TILING_DEFAULT(codellama_rt::ascend::ReshapeAndCacheTiling);
  GET_TILING_DATA_WITH_STRUCT(codellama_rt::ascend::ReshapeAndCacheTiling, t, tiling);
  ReshapeAndCache op;
  op.init(key, value, key_cache, value_cache, slot_mapping, &t);
  op.process();
}
