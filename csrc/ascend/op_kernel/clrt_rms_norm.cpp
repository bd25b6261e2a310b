// rms_norm: see rms_norm.h.
#include "rms_norm.h"

extern "C" __global__ __aicore__ void clrt_rms_norm(GM_ADDR x, GM_ADDR weight, GM_ADDR out,
                                                    GM_ADDR workspace, GM_ADDR tiling) {
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_AIV_ONLY);
  REGISTER_TILING_DEFAULT(codellama_rt::ascend::RmsNormTiling);
  GET_TILING_DATA_WITH_STRUCT(codellama_rt::ascend::RmsNormTiling, t, tiling);
  codellama_rt::ascend::run_rms_norm<false>(x, nullptr, weight, out, nullptr, &t);
}
