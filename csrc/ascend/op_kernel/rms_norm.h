// rms_norm: out = x / sqrt(mean(x^2) + eps) * weight; add_rms_norm: the same of x + residual, which
//           is returned as well                                        (RMSNorm, arXiv:1910.07467)
// Shapes   x, residual, out, residual_out (T, dim), weight (dim), all float16 or all bfloat16
// Traffic  4 * T * dim bytes (8 with a residual), and weight once a core: 16 kB (33 kB) a token of
//          dim 4096
// Limit    memory: 4 FLOP an element, 1 FLOP/byte
// Tiling   one task = one token, whole in the unified buffer (dim up to 10,864): it is read once
// Numerics x + residual is rounded to its type before it is normalised, as everywhere else; squares
//          are summed in float32, 64 at a time, then the sums of those
#pragma once

#include "common.h"

namespace codellama_rt {
namespace ascend {

template <typename T, bool kHasResidual>
class RmsNorm {
 public:
  __aicore__ inline void init(GM_ADDR x, GM_ADDR residual, GM_ADDR weight, GM_ADDR out,
                              GM_ADDR residual_out, const RmsNormTiling* tiling) {
    t_ = tiling;
    x_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(x));
    residual_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(residual));
    weight_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(weight));
    out_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(out));
    residual_out_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(residual_out));
    const uint32_t row = uint32_t(round_up(t_->dim * sizeof(T), kDmaBytes));
    const uint32_t floats = uint32_t(round_up(t_->dim * sizeof(float), kDmaBytes));
    const uint8_t num = uint8_t(t_->num_buffers);
    pipe_.InitBuffer(x_in_, num, row);
    pipe_.InitBuffer(normal_, num, row);
    if (kHasResidual) pipe_.InitBuffer(residual_in_, num, row);
    if (kHasResidual) pipe_.InitBuffer(sum_, num, row);
    pipe_.InitBuffer(weight_in_, 1, row);
    pipe_.InitBuffer(row_, floats);
    pipe_.InitBuffer(other_, floats);
    const int64_t repeats = divide_up(t_->dim, kVectorFloats);
    pipe_.InitBuffer(work_, uint32_t(round_up(repeats * sizeof(float), kDmaBytes)));
    pipe_.InitBuffer(mean_, uint32_t(kDmaBytes));
    pipe_.InitBuffer(root_, uint32_t(8 * kDmaBytes));
  }

  __aicore__ inline void process() {
    const int64_t core = GetBlockIdx();
    if (t_->tasks.first[core] == t_->tasks.first[core + 1]) return;
    LocalTensor<T> weight = weight_in_.template AllocTensor<T>();
    load_row(weight, weight_, t_->dim);
    weight_in_.EnQue(weight);
    weight = weight_in_.template DeQue<T>();
    for (int64_t token = t_->tasks.first[core]; token < t_->tasks.first[core + 1]; ++token) {
      load(token);
      read_row();
      if (kHasResidual) add_residual(token);
      normalise(weight);
      store(token);
    }
    weight_in_.FreeTensor(weight);
  }

 private:
  __aicore__ inline void load(int64_t token) {
    LocalTensor<T> x = x_in_.template AllocTensor<T>();
    load_row(x, x_[token * t_->dim], t_->dim);
    x_in_.EnQue(x);
    if (!kHasResidual) return;
    LocalTensor<T> residual = residual_in_.template AllocTensor<T>();
    load_row(residual, residual_[token * t_->dim], t_->dim);
    residual_in_.EnQue(residual);
  }

  __aicore__ inline void read_row() {
    LocalTensor<T> x = x_in_.template DeQue<T>();
    vector_barrier();  // the buffers' last use
    Cast(row_.Get<float>(), x, RoundMode::CAST_NONE, uint32_t(t_->dim));
    x_in_.FreeTensor(x);
    vector_barrier();
  }

  __aicore__ inline void add_residual(int64_t token) {
    LocalTensor<float> row = row_.Get<float>(), other = other_.Get<float>();
    LocalTensor<T> residual = residual_in_.template DeQue<T>();
    Cast(other, residual, RoundMode::CAST_NONE, uint32_t(t_->dim));
    residual_in_.FreeTensor(residual);
    vector_barrier();
    Add(row, row, other, int32_t(t_->dim));
    vector_barrier();
    LocalTensor<T> sum = sum_.template AllocTensor<T>();
    Cast(sum, row, RoundMode::CAST_RINT, uint32_t(t_->dim));
    vector_barrier();
    Cast(row, sum, RoundMode::CAST_NONE, uint32_t(t_->dim));
    vector_barrier();
    sum_.EnQue(sum);
    sum = sum_.template DeQue<T>();
    store_row(residual_out_[token * t_->dim], sum, t_->dim);
    sum_.FreeTensor(sum);
  }

  __aicore__ inline void normalise(const LocalTensor<T>& weight) {
    LocalTensor<float> row = row_.Get<float>(), other = other_.Get<float>();
    LocalTensor<float> mean = mean_.Get<float>(), root = root_.Get<float>();
    Mul(other, row, row, int32_t(t_->dim));
    Duplicate(mean, 0.0f, int32_t(kBlockFloats));
    vector_barrier();
    sum_row(mean, other, work_.Get<float>(), t_->dim);
    vector_barrier();
    Muls(mean, mean, t_->inverse_dim, int32_t(kBlockFloats));
    vector_barrier();
    Adds(mean, mean, t_->eps, int32_t(kBlockFloats));
    vector_barrier();
    Sqrt(mean, mean, int32_t(kBlockFloats));
    vector_barrier();
    Brcb(root, mean, 1, BrcbRepeatParams(1, 8));  // its first block: the root, eight times
    Cast(other, weight, RoundMode::CAST_NONE, uint32_t(t_->dim));
    vector_barrier();
    const int64_t whole = t_->dim / kVectorFloats, rest = t_->dim % kVectorFloats;
    const BinaryRepeatParams by_one_block(1, 1, 0, 8, 8, 0);
    if (whole > 0) Div(row, row, root, uint64_t(kVectorFloats), uint8_t(whole), by_one_block);
    const uint32_t done = uint32_t(whole * kVectorFloats);
    if (rest > 0) Div(row[done], row[done], root, uint64_t(rest), 1, by_one_block);
    vector_barrier();
    Mul(row, row, other, int32_t(t_->dim));
    vector_barrier();
  }

  // to[0] = the sum of the `count` floats of `x`, 64 at a time; overwrites x and work. All of it is
  // done by the vector pipe: ReduceSum would pass each row's sum through the scalar pipe.
  __aicore__ inline void sum_row(const LocalTensor<float>& to, LocalTensor<float> x,
                                 LocalTensor<float> work, int64_t count) {
    for (; count > kVectorFloats; count = divide_up(count, kVectorFloats)) {
      const int64_t whole = count / kVectorFloats, rest = count % kVectorFloats;
      WholeReduceSum(work, x, int32_t(kVectorFloats), int32_t(whole), 1, 1, 8);
      if (rest > 0) {
        vector_barrier();  // its sum may lie in a block that the others write
        WholeReduceSum(work[whole], x[whole * kVectorFloats], int32_t(rest), 1, 1, 1, 8);
      }
      vector_barrier();
      const LocalTensor<float> sums = work;
      work = x;
      x = sums;
    }
    WholeReduceSum(to, x, int32_t(count), 1, 1, 1, 8);
  }

  __aicore__ inline void store(int64_t token) {
    LocalTensor<T> out = normal_.template AllocTensor<T>();
    Cast(out, row_.Get<float>(), RoundMode::CAST_RINT, uint32_t(t_->dim));
    normal_.EnQue(out);
    out = normal_.template DeQue<T>();
    store_row(out_[token * t_->dim], out, t_->dim);
    normal_.FreeTensor(out);
  }

  const RmsNormTiling* t_;
  TPipe pipe_;
  TQue<TPosition::VECIN, 2> x_in_, residual_in_;
  TQue<TPosition::VECIN, 1> weight_in_;
  TQue<TPosition::VECOUT, 2> normal_, sum_;
  TBuf<TPosition::VECCALC> row_, other_, work_, mean_, root_;
  GlobalTensor<T> x_, residual_, weight_, out_, residual_out_;
};

template <bool kHasResidual>
__aicore__ inline void run_rms_norm(GM_ADDR x, GM_ADDR residual, GM_ADDR weight, GM_ADDR out,
                                    GM_ADDR residual_out, const RmsNormTiling* t) {
  if (t->element_type == kBFloat16) {
    RmsNorm<bfloat16_t, kHasResidual> op;
    op.init(x, residual, weight, out, residual_out, t);
    op.process();
  } else {
    RmsNorm<half, kHasResidual> op;
    op.init(x, residual, weight, out, residual_out, t);
    op.process();
  }
}

}  // namespace ascend
}  // namespace codellama_rt
