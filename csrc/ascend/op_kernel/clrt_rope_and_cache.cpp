// rope_and_cache: query' = R(p) query; key_cache[slot] = R(p) key; value_cache[slot] = value
//                 (RoFormer, arXiv:2104.09864; PagedAttention, arXiv:2309.06180)
// Shapes   qkv (T, (H + 2 K) * D), query (T, H, D), caches (blocks, K, block_size, D) in float16 or
//          bfloat16; cos, sin (positions, D / 2) float32; positions, slot_mapping (T) int32
// Traffic  each head row read once and written once: 2 * 2 * (H + 2 K) * D bytes a token (49 kB at
//          32/32 x 128), and cos and sin (512 B) once a task; no row of K or V of a slot -1
// Limit    memory: 3 FLOP an element rotated, 0.5 FLOP/byte
// Tiling   one task = (token, chunk of query, key or value heads); a chunk is one DMA in and one
//          out; chunks shrink until every core has a task, so that one token uses all cores
// Numerics rotated in float32, rounded once; values are copied
#include "common.h"

namespace codellama_rt {
namespace ascend {

template <typename T>
class RopeAndCache {
 public:
  __aicore__ inline void init(GM_ADDR qkv, GM_ADDR cos, GM_ADDR sin, GM_ADDR positions,
                              GM_ADDR key_cache, GM_ADDR value_cache, GM_ADDR slots, GM_ADDR query,
                              const RopeAndCacheTiling* tiling) {
    t_ = tiling;
    qkv_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(qkv));
    cos_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(cos));
    sin_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(sin));
    positions_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(positions));
    key_cache_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(key_cache));
    value_cache_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(value_cache));
    slots_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(slots));
    query_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(query));
    const int64_t row = t_->chunk_heads * t_->head_dim;
    pipe_.InitBuffer(in_, 2, uint32_t(row * sizeof(T)));
    pipe_.InitBuffer(out_, 2, uint32_t(row * sizeof(T)));
    pipe_.InitBuffer(passing_, 2, uint32_t(row * sizeof(T)));
    pipe_.InitBuffer(tables_, 2, uint32_t(t_->head_dim * sizeof(float)));
    pipe_.InitBuffer(floats_, uint32_t(3 * row * sizeof(float)));
  }

  __aicore__ inline void process() {
    const int64_t core = GetBlockIdx();
    const int64_t query_chunks = divide_up(t_->n_heads, t_->chunk_heads);
    const int64_t kv_chunks = divide_up(t_->n_kv_heads, t_->chunk_heads);
    const int64_t per_token = query_chunks + 2 * kv_chunks;
    for (int64_t task = t_->tasks.first[core]; task < t_->tasks.first[core + 1]; ++task) {
      const int64_t token = task / per_token, chunk = task % per_token;
      if (chunk < query_chunks) {
        rotate_queries(token, chunk * t_->chunk_heads);
      } else if (chunk < query_chunks + kv_chunks) {
        cache_keys(token, (chunk - query_chunks) * t_->chunk_heads);
      } else {
        cache_values(token, (chunk - query_chunks - kv_chunks) * t_->chunk_heads);
      }
    }
  }

 private:
  __aicore__ inline void rotate_queries(int64_t token, int64_t head) {
    const int64_t count = smaller(t_->chunk_heads, t_->n_heads - head);
    LocalTensor<T> rows = rotated(token, head, count);
    DataCopy(query_[(token * t_->n_heads + head) * t_->head_dim], rows,
             uint32_t(count * t_->head_dim));
    out_.FreeTensor(rows);
  }

  __aicore__ inline void cache_keys(int64_t token, int64_t head) {
    const int64_t slot = slots_.GetValue(token),
                  count = smaller(t_->chunk_heads, t_->n_kv_heads - head);
    if (slot < 0) return;
    LocalTensor<T> rows = rotated(token, t_->n_heads + head, count);
    store_heads(key_cache_[cache_row(slot, head)], rows, count, t_->head_dim, t_->block_size);
    out_.FreeTensor(rows);
  }

  __aicore__ inline void cache_values(int64_t token, int64_t head) {
    const int64_t slot = slots_.GetValue(token),
                  count = smaller(t_->chunk_heads, t_->n_kv_heads - head);
    if (slot < 0) return;
    LocalTensor<T> rows = passing_.template AllocTensor<T>();
    DataCopy(rows, qkv_[qkv_row(token, t_->n_heads + t_->n_kv_heads + head)],
             uint32_t(count * t_->head_dim));
    passing_.EnQue(rows);
    rows = passing_.template DeQue<T>();
    store_heads(value_cache_[cache_row(slot, head)], rows, count, t_->head_dim, t_->block_size);
    passing_.FreeTensor(rows);
  }

  // `count` heads of qkv from `head` on, rotated: a tensor of out_.
  __aicore__ inline LocalTensor<T> rotated(int64_t token, int64_t head, int64_t count) {
    const int64_t half = t_->head_dim / 2, size = count * t_->head_dim;
    const int64_t position = positions_.GetValue(token);
    LocalTensor<float> tables = tables_.template AllocTensor<float>();
    DataCopy(tables, cos_[position * half], uint32_t(half));
    DataCopy(tables[half], sin_[position * half], uint32_t(half));
    tables_.EnQue(tables);
    LocalTensor<T> rows = in_.template AllocTensor<T>();
    DataCopy(rows, qkv_[qkv_row(token, head)], uint32_t(size));
    in_.EnQue(rows);

    rows = in_.template DeQue<T>();
    tables = tables_.template DeQue<float>();
    const int64_t buffer = t_->chunk_heads * t_->head_dim;
    LocalTensor<float> x = floats_.Get<float>(), y = x[buffer], z = x[2 * buffer];
    vector_barrier();  // the buffers' last use
    Cast(x, rows, RoundMode::CAST_NONE, uint32_t(size));
    in_.FreeTensor(rows);
    vector_barrier();
    multiply(y, x, tables, count);              // first half * cos
    multiply(y[half], x[half], tables, count);  // second half * cos
    multiply(z, x[half], tables[half], count);  // second half * sin
    multiply(z[half], x, tables[half], count);  // first half * sin
    tables_.FreeTensor(tables);
    vector_barrier();
    subtract_first_add_second(y, z, count);
    vector_barrier();
    LocalTensor<T> out = out_.template AllocTensor<T>();
    Cast(out, y, RoundMode::CAST_RINT, uint32_t(size));
    out_.EnQue(out);
    return out_.template DeQue<T>();
  }

  // to[h] = rows[h] * table, of half a head.
  __aicore__ inline void multiply(const LocalTensor<float>& to, const LocalTensor<float>& rows,
                                  const LocalTensor<float>& table, int64_t count) {
    const int64_t half = t_->head_dim / 2;
    const uint8_t stride = uint8_t(t_->head_dim / kBlockFloats);
    for (int64_t c = 0; c < half; c += kVectorFloats) {
      Mul(to[c], rows[c], table[c], uint64_t(smaller(kVectorFloats, half - c)), uint8_t(count),
          BinaryRepeatParams(1, 1, 1, stride, stride, 0));
    }
  }

  __aicore__ inline void subtract_first_add_second(const LocalTensor<float>& y,
                                                   const LocalTensor<float>& z, int64_t count) {
    const int64_t half = t_->head_dim / 2;
    const uint8_t stride = uint8_t(t_->head_dim / kBlockFloats);
    const BinaryRepeatParams rows(1, 1, 1, stride, stride, stride);
    for (int64_t c = 0; c < half; c += kVectorFloats) {
      const uint64_t mask = uint64_t(smaller(kVectorFloats, half - c));
      Sub(y[c], y[c], z[c], mask, uint8_t(count), rows);
      Add(y[half + c], y[half + c], z[half + c], mask, uint8_t(count), rows);
    }
  }

  __aicore__ inline int64_t qkv_row(int64_t token, int64_t head) const {
    return (token * (t_->n_heads + 2 * t_->n_kv_heads) + head) * t_->head_dim;
  }
  __aicore__ inline int64_t cache_row(int64_t slot, int64_t head) const {
    const int64_t page = slot / t_->block_size * t_->n_kv_heads + head;
    return (page * t_->block_size + slot % t_->block_size) * t_->head_dim;
  }

  const RopeAndCacheTiling* t_;
  TPipe pipe_;
  TQue<TPosition::VECIN, 2> in_, tables_;
  TQue<TPosition::VECOUT, 2> out_;
  TQueBind<TPosition::VECIN, TPosition::VECOUT, 2> passing_;
  TBuf<TPosition::VECCALC> floats_;
  GlobalTensor<T> qkv_, key_cache_, value_cache_, query_;
  GlobalTensor<float> cos_, sin_;
  GlobalTensor<int32_t> positions_, slots_;
};

}  // namespace ascend
}  // namespace codellama_rt

extern "C" __global__ __aicore__ void clrt_rope_and_cache(GM_ADDR qkv, GM_ADDR cos, GM_ADDR sin,
                                                          GM_ADDR positions, GM_ADDR key_cache,
                                                          GM_ADDR value_cache, GM_ADDR slot_mapping,
                                                          GM_ADDR query, GM_ADDR key_cache_out,
                                                          GM_ADDR value_cache_out,
                                                          GM_ADDR workspace, GM_ADDR tiling) {
  using namespace codellama_rt::ascend;
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  REGISTER_TILING_DEFAULT(codellama_rt::ascend::RopeAndCacheTiling);
  GET_TILING_DATA_WITH_STRUCT(codellama_rt::ascend::RopeAndCacheTiling, t, tiling);
  if (t.element_type == kBFloat16) {
    RopeAndCache<bfloat16_t> op;
    op.init(qkv, cos, sin, positions, key_cache, value_cache, slot_mapping, query, &t);
    op.process();
  } else {
    RopeAndCache<half> op;
    op.init(qkv, cos, sin, positions, key_cache, value_cache, slot_mapping, query, &t);
    op.process();
  }
}
