// What the definitions of the ops share: CANN's contexts to plans and back.
#pragma once

#include <cstring>
#include <exception>

#include "plan.h"
#include "register/op_def_registry.h"
#include "tiling/platform/platform_ascendc.h"

namespace codellama_rt {
namespace ascend {

inline int64_t dim(const gert::TilingContext* context, size_t input, size_t axis) {
  return context->GetInputShape(input)->GetStorageShape().GetDim(axis);
}

inline int64_t element_type(const gert::TilingContext* context, size_t input) {
  return context->GetInputDesc(input)->GetDataType() == ge::DT_BF16 ? kBFloat16 : kFloat16;
}

inline platform_ascendc::PlatformAscendC platform(gert::TilingContext* context) {
  return platform_ascendc::PlatformAscendC(context->GetPlatformInfo());
}

inline int64_t num_cores(gert::TilingContext* context) {
  const int64_t cores = platform(context).GetCoreNumAiv();
  return cores < kMaxCores ? cores : kMaxCores;
}

// Hands a plan over; `make` may refuse by an exception.
template <typename Make>
ge::graphStatus set_tiling(gert::TilingContext* context, const Make& make) {
  try {
    const auto tiling = make(num_cores(context));
    if (context->GetRawTilingData()->GetCapacity() < sizeof(tiling)) return ge::GRAPH_FAILED;
    std::memcpy(context->GetRawTilingData()->GetData(), &tiling, sizeof(tiling));
    context->GetRawTilingData()->SetDataSize(sizeof(tiling));
  } catch (const std::exception&) {
    return ge::GRAPH_FAILED;
  }
  context->SetBlockDim(uint32_t(num_cores(context)));
  context->GetWorkspaceSizes(1)[0] = platform(context).GetLibApiWorkSpaceSize();
  return ge::GRAPH_SUCCESS;
}

// Of every tensor of an op: two combinations, float16 and bfloat16.
inline void floats(ops::OpParamDef& tensor) {
  tensor.ParamType(ops::REQUIRED)
      .DataType({ge::DT_FLOAT16, ge::DT_BF16})
      .Format({ge::FORMAT_ND, ge::FORMAT_ND})
      .UnknownShapeFormat({ge::FORMAT_ND, ge::FORMAT_ND});
}
inline ops::OpParamDef& fixed(ops::OpParamDef& tensor, ge::DataType type) {
  return tensor.ParamType(ops::REQUIRED)
      .DataType({type, type})
      .Format({ge::FORMAT_ND, ge::FORMAT_ND})
      .UnknownShapeFormat({ge::FORMAT_ND, ge::FORMAT_ND});
}

// Output i like input j.
inline void same(gert::InferShapeContext* context, size_t output, size_t input) {
  *context->GetOutputShape(output) = *context->GetInputShape(input);
}
inline void same(gert::InferDataTypeContext* context, size_t output, size_t input) {
  context->SetOutputDataType(output, context->GetInputDataType(input));
}

inline void for_ascend(ops::OpDef* op, ge::graphStatus (*tiling)(gert::TilingContext*)) {
  op->AICore().SetTiling(tiling);
  op->AICore().AddConfig("ascend910b");
  op->AICore().AddConfig("ascend910_93");
}

}  // namespace ascend
}  // namespace codellama_rt
