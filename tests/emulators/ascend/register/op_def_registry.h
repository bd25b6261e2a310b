// The part of CANN's host interface that op_host uses, so that its files compile and run here.
//
// A definition's inputs, outputs and attributes are recorded in their order; a tiling function then
// runs on a TilingContext over them. Written from the public documentation; no code of CANN.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ge {

using graphStatus = uint32_t;
constexpr graphStatus GRAPH_SUCCESS = 0, GRAPH_FAILED = 0xffffffff;
enum DataType { DT_FLOAT = 0, DT_FLOAT16 = 1, DT_INT32 = 3, DT_INT64 = 9, DT_BF16 = 27 };
enum Format { FORMAT_ND = 2 };

}  // namespace ge

namespace fe {
struct PlatFormInfos {
  uint32_t num_vector_cores;
};
}  // namespace fe

namespace ascend_emu {
// What the libraries under a kernel take of its workspace, before its own part (16 MB on a device).
constexpr uint32_t kLibraryWorkspace = 4096;
}  // namespace ascend_emu

namespace gert {

class Shape {
 public:
  Shape() = default;
  explicit Shape(std::vector<int64_t> dims) : dims_(std::move(dims)) {}
  int64_t GetDim(size_t i) const { return dims_.at(i); }
  size_t GetDimNum() const { return dims_.size(); }
  void SetDimNum(size_t n) { dims_.resize(n); }
  void SetDim(size_t i, int64_t size) { dims_.at(i) = size; }
  bool operator==(const Shape& other) const { return dims_ == other.dims_; }

 private:
  std::vector<int64_t> dims_;
};

struct StorageShape {
  Shape shape;
  const Shape& GetStorageShape() const { return shape; }
};

struct CompileTimeTensorDesc {
  ge::DataType dtype;
  ge::DataType GetDataType() const { return dtype; }
};

struct Tensor {
  StorageShape storage;
  CompileTimeTensorDesc desc;
  const void* address = nullptr;  // on the host for inputs whose values the tiling reads
  template <typename T>
  const T* GetData() const {
    return static_cast<const T*>(address);
  }
};

struct RuntimeAttrs {
  std::vector<float> floats;
  const float* GetFloat(size_t i) const { return i < floats.size() ? &floats[i] : nullptr; }
};

class TilingData {
 public:
  explicit TilingData(size_t capacity) : bytes_(capacity) {}
  void* GetData() { return bytes_.data(); }
  size_t GetCapacity() const { return bytes_.size(); }
  void SetDataSize(size_t size) { size_ = size; }
  size_t GetDataSize() const { return size_; }

 private:
  std::vector<uint8_t> bytes_;
  size_t size_ = 0;
};

class TilingContext {
 public:
  std::vector<Tensor> inputs;
  RuntimeAttrs attributes;
  fe::PlatFormInfos platform{0};
  TilingData tiling_data{16 * 1024};
  size_t workspace = 0;
  uint32_t block_dim = 0, schedule_mode = 0;

  const char* GetNodeName() const { return "emulated"; }
  const StorageShape* GetInputShape(size_t i) const {
    return i < inputs.size() ? &inputs[i].storage : nullptr;
  }
  const CompileTimeTensorDesc* GetInputDesc(size_t i) const {
    return i < inputs.size() ? &inputs[i].desc : nullptr;
  }
  const Tensor* GetInputTensor(size_t i) const { return i < inputs.size() ? &inputs[i] : nullptr; }
  const RuntimeAttrs* GetAttrs() const { return &attributes; }
  fe::PlatFormInfos* GetPlatformInfo() { return &platform; }
  TilingData* GetRawTilingData() { return &tiling_data; }
  size_t* GetWorkspaceSizes(size_t) { return &workspace; }
  ge::graphStatus SetBlockDim(uint32_t n) {
    block_dim = n;
    return ge::GRAPH_SUCCESS;
  }
  ge::graphStatus SetScheduleMode(uint32_t mode) {
    schedule_mode = mode;
    return ge::GRAPH_SUCCESS;
  }
};

class InferShapeContext {
 public:
  std::vector<Shape> inputs, outputs;
  const Shape* GetInputShape(size_t i) const { return &inputs.at(i); }
  Shape* GetOutputShape(size_t i) { return &outputs.at(i); }
};

class InferDataTypeContext {
 public:
  std::vector<ge::DataType> inputs, outputs;
  ge::DataType GetInputDataType(size_t i) const { return inputs.at(i); }
  ge::graphStatus SetOutputDataType(size_t i, ge::DataType type) {
    outputs.at(i) = type;
    return ge::GRAPH_SUCCESS;
  }
};

}  // namespace gert

namespace ops {

using TilingFunction = ge::graphStatus (*)(gert::TilingContext*);
using ShapeFunction = ge::graphStatus (*)(gert::InferShapeContext*);
using TypeFunction = ge::graphStatus (*)(gert::InferDataTypeContext*);
enum Option { REQUIRED, OPTIONAL };

class OpParamDef {
 public:
  OpParamDef& ParamType(Option) { return *this; }
  OpParamDef& DataType(std::vector<ge::DataType> types) {
    dtypes = std::move(types);
    return *this;
  }
  OpParamDef& Format(std::vector<ge::Format>) { return *this; }
  OpParamDef& UnknownShapeFormat(std::vector<ge::Format>) { return *this; }
  OpParamDef& ValueDepend(Option) {
    value_depend = true;
    return *this;
  }

  std::string name;
  std::vector<ge::DataType> dtypes;  // one a combination that the op takes
  bool value_depend = false;
};

class OpAttrDef {
 public:
  OpAttrDef& AttrType(Option) { return *this; }
  OpAttrDef& Float() { return *this; }
  OpAttrDef& Float(float) { return *this; }
};

class OpAICoreDef {
 public:
  OpAICoreDef& SetTiling(TilingFunction function) {
    tiling = function;
    return *this;
  }
  OpAICoreDef& AddConfig(const char*) { return *this; }
  TilingFunction tiling = nullptr;
};

class OpDef {
 public:
  explicit OpDef(const char* op) : name(op) {}
  OpParamDef& Input(const char* input) { return add(&inputs, input); }
  OpParamDef& Output(const char* output) { return add(&outputs, output); }
  OpAttrDef& Attr(const char* attribute) {
    attributes.emplace_back(attribute);
    return attribute_;
  }
  OpDef& SetInferShape(ShapeFunction function) {
    shape_function = function;
    return *this;
  }
  OpDef& SetInferDataType(TypeFunction function) {
    type_function = function;
    return *this;
  }
  OpAICoreDef& AICore() { return core; }

  std::string name;
  std::vector<OpParamDef> inputs, outputs;
  std::vector<std::string> attributes;
  ShapeFunction shape_function = nullptr;
  TypeFunction type_function = nullptr;
  OpAICoreDef core;

 private:
  static OpParamDef& add(std::vector<OpParamDef>* to, const char* name) {
    to->emplace_back();
    to->back().name = name;
    return to->back();
  }
  OpAttrDef attribute_;
};

// What OP_ADD registered.
inline std::map<std::string, OpDef>& registry() {
  static std::map<std::string, OpDef> ops;
  return ops;
}
inline bool add(const OpDef& op) { return registry().emplace(op.name, op).second; }

}  // namespace ops

#define OP_ADD(Type) static const bool Type##_added = ops::add(Type(#Type))
