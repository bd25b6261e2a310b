// rope_and_cache for CANN: aclnnClrtRopeAndCache(qkv, cos, sin, positions, keyCacheRef,
// valueCacheRef, slotMapping, query).
#include "op_host.h"

namespace codellama_rt {
namespace ascend {
namespace {

ge::graphStatus tile_rope_and_cache(gert::TilingContext* context) {
  return set_tiling(context, [&](int64_t cores) {
    const int64_t n_kv_heads = dim(context, 4, 1), head_dim = dim(context, 4, 3);
    const int64_t n_heads = dim(context, 0, 1) / head_dim - 2 * n_kv_heads;
    return plan_rope_and_cache(dim(context, 0, 0), n_heads, n_kv_heads, head_dim,
                               dim(context, 4, 2), element_type(context, 0), cores);
  });
}

ge::graphStatus infer_shape(gert::InferShapeContext* context) {
  const gert::Shape& cache = *context->GetInputShape(4);
  gert::Shape* query = context->GetOutputShape(0);
  query->SetDimNum(3);
  query->SetDim(0, context->GetInputShape(0)->GetDim(0));
  query->SetDim(1, context->GetInputShape(0)->GetDim(1) / cache.GetDim(3) - 2 * cache.GetDim(1));
  query->SetDim(2, cache.GetDim(3));
  same(context, 1, 4);
  same(context, 2, 5);
  return ge::GRAPH_SUCCESS;
}

ge::graphStatus infer_type(gert::InferDataTypeContext* context) {
  same(context, 0, 0);
  same(context, 1, 4);
  same(context, 2, 5);
  return ge::GRAPH_SUCCESS;
}

}  // namespace
}  // namespace ascend
}  // namespace codellama_rt

namespace ops {

class ClrtRopeAndCache : public OpDef {
 public:
  explicit ClrtRopeAndCache(const char* name) : OpDef(name) {
    using namespace codellama_rt::ascend;
    floats(Input("qkv"));
    fixed(Input("cos"), ge::DT_FLOAT);
    fixed(Input("sin"), ge::DT_FLOAT);
    fixed(Input("positions"), ge::DT_INT32);
    floats(Input("key_cache"));
    floats(Input("value_cache"));
    fixed(Input("slot_mapping"), ge::DT_INT32);
    floats(Output("query"));
    floats(Output("key_cache"));
    floats(Output("value_cache"));
    SetInferShape(infer_shape);
    SetInferDataType(infer_type);
    for_ascend(this, tile_rope_and_cache);
  }
};
OP_ADD(ClrtRopeAndCache);

}  // namespace ops
