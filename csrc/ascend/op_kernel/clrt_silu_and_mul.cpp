// silu_and_mul: out = gate / (1 + exp(-gate)) * up                      (SwiGLU, arXiv:2002.05202)
// Shapes   gate_up (T, 2 * hidden), out (T, hidden), float16 or bfloat16
// Traffic  6 * T * hidden bytes (66 kB a token at hidden 11008), each element once
// Limit    memory: 5 FLOP an element, 0.8 FLOP/byte
// Tiling   one task = (token, chunk of up to 4096 elements); chunks shrink for few tokens
// Numerics float32; exp(-gate) may overflow to infinity, the quotient is then 0 as it should be
#include "common.h"

namespace codellama_rt {
namespace ascend {

template <typename T>
class SiluAndMul {
 public:
  __aicore__ inline void init(GM_ADDR gate_up, GM_ADDR out, const SiluAndMulTiling* tiling) {
    t_ = tiling;
    gate_up_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(gate_up));
    out_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(out));
    const uint32_t row = uint32_t(t_->chunk * sizeof(T));
    pipe_.InitBuffer(gate_in_, 2, row);
    pipe_.InitBuffer(up_in_, 2, row);
    pipe_.InitBuffer(product_, 2, row);
    pipe_.InitBuffer(floats_, uint32_t(3 * t_->chunk * sizeof(float)));
  }

  __aicore__ inline void process() {
    const int64_t core = GetBlockIdx(), chunks = divide_up(t_->hidden_dim, t_->chunk);
    for (int64_t task = t_->tasks.first[core]; task < t_->tasks.first[core + 1]; ++task) {
      const int64_t token = task / chunks, begin = task % chunks * t_->chunk;
      const int64_t count = smaller(t_->chunk, t_->hidden_dim - begin);
      load(gate_in_, token * 2 * t_->hidden_dim + begin, count);
      load(up_in_, (token * 2 + 1) * t_->hidden_dim + begin, count);
      compute(int32_t(count));
      LocalTensor<T> product = product_.template DeQue<T>();
      store_row(out_[token * t_->hidden_dim + begin], product, count);
      product_.FreeTensor(product);
    }
  }

 private:
  __aicore__ inline void load(TQue<TPosition::VECIN, 2>& queue, int64_t from, int64_t count) {
    LocalTensor<T> in = queue.template AllocTensor<T>();
    load_row(in, gate_up_[from], count);
    queue.EnQue(in);
  }

  __aicore__ inline void compute(int32_t count) {
    LocalTensor<float> gate = floats_.Get<float>();
    LocalTensor<float> up = gate[t_->chunk], divisor = gate[2 * t_->chunk];
    LocalTensor<T> gate_in = gate_in_.template DeQue<T>(), up_in = up_in_.template DeQue<T>();
    vector_barrier();  // the buffers' last use
    Cast(gate, gate_in, RoundMode::CAST_NONE, uint32_t(count));
    Cast(up, up_in, RoundMode::CAST_NONE, uint32_t(count));
    gate_in_.FreeTensor(gate_in);
    up_in_.FreeTensor(up_in);
    vector_barrier();
    Muls(divisor, gate, -1.0f, count);
    vector_barrier();
    Exp(divisor, divisor, count);
    vector_barrier();
    Adds(divisor, divisor, 1.0f, count);
    vector_barrier();
    Div(gate, gate, divisor, count);
    vector_barrier();
    Mul(up, up, gate, count);
    vector_barrier();
    LocalTensor<T> product = product_.template AllocTensor<T>();
    Cast(product, up, RoundMode::CAST_RINT, uint32_t(count));
    product_.EnQue(product);
  }

  const SiluAndMulTiling* t_;
  TPipe pipe_;
  TQue<TPosition::VECIN, 2> gate_in_, up_in_;
  TQue<TPosition::VECOUT, 2> product_;
  TBuf<TPosition::VECCALC> floats_;
  GlobalTensor<T> gate_up_, out_;
};

}  // namespace ascend
}  // namespace codellama_rt

extern "C" __global__ __aicore__ void clrt_silu_and_mul(GM_ADDR gate_up, GM_ADDR out,
                                                        GM_ADDR workspace, GM_ADDR tiling) {
  using namespace codellama_rt::ascend;
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  REGISTER_TILING_DEFAULT(codellama_rt::ascend::SiluAndMulTiling);
  GET_TILING_DATA_WITH_STRUCT(codellama_rt::ascend::SiluAndMulTiling, t, tiling);
  if (t.element_type == kBFloat16) {
    SiluAndMul<bfloat16_t> op;
    op.init(gate_up, out, &t);
    op.process();
  } else {
    SiluAndMul<half> op;
    op.init(gate_up, out, &t);
    op.process();
  }
}
