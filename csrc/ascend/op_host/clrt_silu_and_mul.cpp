// silu_and_mul for CANN: aclnnClrtSiluAndMul(gateUp, out).
#include "op_host.h"

namespace codellama_rt {
namespace ascend {
namespace {

ge::graphStatus tile_silu_and_mul(gert::TilingContext* context) {
  return set_tiling(context, [&](int64_t cores) {
    return plan_silu_and_mul(dim(context, 0, 0), dim(context, 0, 1) / 2, element_type(context, 0),
                             cores);
  });
}

ge::graphStatus infer_shape(gert::InferShapeContext* context) {
  same(context, 0, 0);
  context->GetOutputShape(0)->SetDim(1, context->GetInputShape(0)->GetDim(1) / 2);
  return ge::GRAPH_SUCCESS;
}

ge::graphStatus infer_type(gert::InferDataTypeContext* context) {
  same(context, 0, 0);
  return ge::GRAPH_SUCCESS;
}

}  // namespace
}  // namespace ascend
}  // namespace codellama_rt

namespace ops {

class ClrtSiluAndMul : public OpDef {
 public:
  explicit ClrtSiluAndMul(const char* name) : OpDef(name) {
    using namespace codellama_rt::ascend;
    floats(Input("gate_up"));
    floats(Output("out"));
    SetInferShape(infer_shape);
    SetInferDataType(infer_type);
    for_ascend(this, tile_silu_and_mul);
  }
};
OP_ADD(ClrtSiluAndMul);

}  // namespace ops
