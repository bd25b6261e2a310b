// reshape_and_cache for CANN: aclnnClrtReshapeAndCache(key, value, keyCacheRef, valueCacheRef,
// slotMapping).
#include "op_host.h"

namespace codellama_rt {
namespace ascend {
namespace {

ge::graphStatus tile_reshape_and_cache(gert::TilingContext* context) {
  return set_tiling(context, [&](int64_t cores) {
    return plan_reshape_and_cache(dim(context, 0, 0), dim(context, 2, 1), dim(context, 2, 3),
                                  dim(context, 2, 2), cores);
  });
}

ge::graphStatus infer_shape(gert::InferShapeContext* context) {
  same(context, 0, 2);
  same(context, 1, 3);
  return ge::GRAPH_SUCCESS;
}

ge::graphStatus infer_type(gert::InferDataTypeContext* context) {
  same(context, 0, 2);
  same(context, 1, 3);
  return ge::GRAPH_SUCCESS;
}

}  // namespace
}  // namespace ascend
}  // namespace codellama_rt

namespace ops {

class ClrtReshapeAndCache : public OpDef {
 public:
  explicit ClrtReshapeAndCache(const char* name) : OpDef(name) {
    using namespace codellama_rt::ascend;
    floats(Input("key"));
    floats(Input("value"));
    floats(Input("key_cache"));
    floats(Input("value_cache"));
    fixed(Input("slot_mapping"), ge::DT_INT32);
    floats(Output("key_cache"));
    floats(Output("value_cache"));
    SetInferShape(infer_shape);
    SetInferDataType(infer_type);
    for_ascend(this, tile_reshape_and_cache);
  }
};
OP_ADD(ClrtReshapeAndCache);

}  // namespace ops
