// rms_norm and add_rms_norm for CANN: aclnnClrtRmsNorm(x, weight, eps, out) and
// aclnnClrtAddRmsNorm(x, residual, weight, eps, out, residualOut).
#include "op_host.h"

namespace codellama_rt {
namespace ascend {
namespace {

template <bool kHasResidual>
ge::graphStatus tile_rms_norm(gert::TilingContext* context) {
  return set_tiling(context, [&](int64_t cores) {
    return plan_rms_norm(dim(context, 0, 0), dim(context, 0, 1), kHasResidual,
                         *context->GetAttrs()->GetFloat(0), element_type(context, 0), cores);
  });
}

template <int kOutputs, typename Context>
ge::graphStatus like_x(Context* context) {
  for (int i = 0; i < kOutputs; ++i) same(context, size_t(i), 0);
  return ge::GRAPH_SUCCESS;
}

}  // namespace
}  // namespace ascend
}  // namespace codellama_rt

namespace ops {

class ClrtRmsNorm : public OpDef {
 public:
  explicit ClrtRmsNorm(const char* name) : OpDef(name) {
    using namespace codellama_rt::ascend;
    floats(Input("x"));
    floats(Input("weight"));
    floats(Output("out"));
    Attr("eps").AttrType(OPTIONAL).Float(1e-5f);
    SetInferShape(like_x<1, gert::InferShapeContext>);
    SetInferDataType(like_x<1, gert::InferDataTypeContext>);
    for_ascend(this, tile_rms_norm<false>);
  }
};
OP_ADD(ClrtRmsNorm);

class ClrtAddRmsNorm : public OpDef {
 public:
  explicit ClrtAddRmsNorm(const char* name) : OpDef(name) {
    using namespace codellama_rt::ascend;
    floats(Input("x"));
    floats(Input("residual"));
    floats(Input("weight"));
    floats(Output("out"));
    floats(Output("residual_out"));
    Attr("eps").AttrType(OPTIONAL).Float(1e-5f);
    SetInferShape(like_x<2, gert::InferShapeContext>);
    SetInferDataType(like_x<2, gert::InferDataTypeContext>);
    for_ascend(this, tile_rms_norm<true>);
  }
};
OP_ADD(ClrtAddRmsNorm);

}  // namespace ops
