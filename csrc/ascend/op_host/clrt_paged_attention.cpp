// paged_attention for CANN: aclnnClrtPagedAttention(query, keyCache, valueCache, blockTables,
// seqLens, cuSeqlensQ, scale, out, lse). The lengths are read by the tiling: aclIntArray.
#include "op_host.h"

namespace codellama_rt {
namespace ascend {
namespace {

constexpr uint32_t kAllCoresTogether = 1;  // the kernel has a SyncAll: none may start later

ge::graphStatus tile_paged_attention(gert::TilingContext* context) {
  size_t workspace = 0;
  const ge::graphStatus status = set_tiling(context, [&](int64_t cores) {
    AttentionSizes s;
    s.num_tokens = dim(context, 0, 0);
    s.n_heads = dim(context, 0, 1);
    s.head_dim = dim(context, 0, 2);
    s.n_kv_heads = dim(context, 1, 1);
    s.block_size = dim(context, 1, 2);
    s.num_seqs = dim(context, 3, 0);
    s.max_blocks = dim(context, 3, 1);
    s.element_type = element_type(context, 0);
    s.scale = *context->GetAttrs()->GetFloat(0);
    const auto tiling = plan_paged_attention(s, context->GetInputTensor(4)->GetData<int64_t>(),
                                             context->GetInputTensor(5)->GetData<int64_t>(), cores);
    workspace = size_t(workspace_bytes(tiling));
    return tiling;
  });
  if (status != ge::GRAPH_SUCCESS) return status;
  context->GetWorkspaceSizes(1)[0] += workspace;
  return context->SetScheduleMode(kAllCoresTogether);
}

ge::graphStatus infer_shape(gert::InferShapeContext* context) {
  same(context, 0, 0);
  gert::Shape* lse = context->GetOutputShape(1);
  lse->SetDimNum(2);
  lse->SetDim(0, context->GetInputShape(0)->GetDim(0));
  lse->SetDim(1, context->GetInputShape(0)->GetDim(1));
  return ge::GRAPH_SUCCESS;
}

ge::graphStatus infer_type(gert::InferDataTypeContext* context) {
  same(context, 0, 0);
  context->SetOutputDataType(1, ge::DT_FLOAT);
  return ge::GRAPH_SUCCESS;
}

}  // namespace
}  // namespace ascend
}  // namespace codellama_rt

namespace ops {

class ClrtPagedAttention : public OpDef {
 public:
  explicit ClrtPagedAttention(const char* name) : OpDef(name) {
    using namespace codellama_rt::ascend;
    floats(Input("query"));
    floats(Input("key_cache"));
    floats(Input("value_cache"));
    fixed(Input("block_tables"), ge::DT_INT32);
    fixed(Input("seq_lens"), ge::DT_INT64).ValueDepend(REQUIRED);
    fixed(Input("cu_seqlens_q"), ge::DT_INT64).ValueDepend(REQUIRED);
    floats(Output("out"));
    fixed(Output("lse"), ge::DT_FLOAT);
    Attr("scale").AttrType(REQUIRED).Float();
    SetInferShape(infer_shape);
    SetInferDataType(infer_type);
    for_ascend(this, tile_paged_attention);
  }
};
OP_ADD(ClrtPagedAttention);

}  // namespace ops
