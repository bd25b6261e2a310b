// Tensors of other frameworks by DLPack (dmlc.github.io/dlpack, versions 0 and 1): on the CPU.
//
// The structs are DLPack's own layout. A capsule that nobody consumed gives its memory back when it
// is destroyed, so that holding it for the length of a call is all that reading a tensor takes.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "bind/gil.h"
#include "common/check.h"

namespace codellama_rt {
namespace dlpack {

namespace py = pybind11;

struct Device {
  int32_t type, id;
};
struct ElementType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  ElementType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements; null: contiguous
  uint64_t byte_offset;
};
struct Managed {
  Tensor tensor;
  void* context;
  void (*deleter)(Managed*);
};
struct ManagedVersioned {
  uint32_t major, minor;
  void* context;
  void (*deleter)(ManagedVersioned*);
  uint64_t flags;
  Tensor tensor;
};

constexpr int32_t kCpu = 1, kCuda = 2;
constexpr int32_t kCudaHost = 3;  // pinned memory, which a CPU reads too
constexpr uint8_t kInt = 0, kUInt = 1, kFloat = 2, kComplex = 5, kBFloat = 4, kBool = 6;
constexpr uint64_t kReadOnly = 1;

// "bfloat16", "uint8": the name lives for good. Under the GIL.
inline const std::string& name_of(ElementType type) {
  static auto* names = new std::unordered_map<uint32_t, std::string>;
  std::string& name = (*names)[type.code | type.bits << 8 | uint32_t(type.lanes) << 16];
  if (!name.empty()) return name;
  const char* kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  name = type.code <= kBool ? kinds[type.code] : "code" + std::to_string(type.code) + "_";
  if (type.code != kBool) name += std::to_string(type.bits);
  if (type.lanes != 1) name += "x" + std::to_string(type.lanes);
  return name;
}

// The object's capsule: of version 1, which says what is read-only, where the object knows it.
inline py::object capsule_of(py::handle object) {
  const py::object export_it = py::getattr(object, "__dlpack__");
  const py::dict arguments(py::arg("max_version") = py::make_tuple(1, 0));
  PyObject* capsule = or_sleep_for_good(
      [&] { return PyObject_Call(export_it.ptr(), py::tuple().ptr(), arguments.ptr()); });
  if (!capsule && PyErr_ExceptionMatches(PyExc_TypeError)) {
    PyErr_Clear();
    capsule = or_sleep_for_good([&] { return PyObject_CallNoArgs(export_it.ptr()); });
  }
  if (!capsule) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(capsule);
}

inline void require_cpu(int32_t device, const std::string& what) {
  if (device == kCpu || device == kCudaHost) return;
  throw std::runtime_error("an op on the CPU takes tensors in its memory, got " + what +
                           " on DLPack's device type " + std::to_string(device) +
                           "; copy it to the CPU first");
}

// Of an object that has __dlpack__; `kept` holds its memory.
inline TensorView view(py::handle object, const std::string& what, std::vector<py::object>& kept) {
  if (py::hasattr(object, "__dlpack_device__")) {  // asked first: exporting might wait for a device
    const py::tuple device = py::getattr(object, "__dlpack_device__")();
    require_cpu(device[0].cast<int32_t>(), what);
  }
  kept.push_back(capsule_of(object));
  PyObject* capsule = kept.back().ptr();
  TensorView t;
  const Tensor* tensor = nullptr;
  if (PyCapsule_IsValid(capsule, "dltensor_versioned")) {
    auto* managed =
        static_cast<ManagedVersioned*>(PyCapsule_GetPointer(capsule, "dltensor_versioned"));
    if (managed->major != 1) {
      throw std::runtime_error(what + " speaks version " + std::to_string(managed->major) +
                               " of DLPack, not 1");
    }
    t.writable = (managed->flags & kReadOnly) == 0;
    tensor = &managed->tensor;
  } else if (PyCapsule_IsValid(capsule, "dltensor")) {
    tensor = &static_cast<Managed*>(PyCapsule_GetPointer(capsule, "dltensor"))->tensor;
  } else {
    throw DtypeError("the __dlpack__ of " + what + " gives no DLPack capsule");
  }
  require_cpu(tensor->device.type, what);
  if (tensor->ndim < 0 || tensor->ndim > kMaxDims) {
    throw std::invalid_argument("a tensor of an op has at most " + std::to_string(kMaxDims) +
                                " dimensions, got " + std::to_string(tensor->ndim));
  }
  const std::string& name = name_of(tensor->dtype);
  t.dtype_text = name.c_str();
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt32}) {
    if (name == dtype_name(dtype)) t.dtype = dtype;
  }
  t.data = static_cast<char*>(tensor->data) + tensor->byte_offset;
  t.ndim = tensor->ndim;
  for (int i = 0; i < t.ndim; ++i) t.shape[i] = tensor->shape[i];
  set_contiguous_strides(t);
  for (int i = 0; tensor->strides && i < t.ndim; ++i) t.strides[i] = tensor->strides[i];
  return t;
}

// ---- out
// -----------------------------------------------------------------------------------------

// A NumPy array with what DLPack says of it.
template <typename M>
struct Export {
  M managed{};
  std::vector<int64_t> shape, strides;
  PyObject* array = nullptr;
};

inline ElementType element_type(const py::dtype& dtype) {
  const uint8_t bits = uint8_t(dtype.itemsize() * 8);
  const std::string name = py::str(py::getattr(dtype, "name"));
  if (name == "bfloat16") return {kBFloat, bits, 1};
  const bool native = py::getattr(dtype, "isnative").cast<bool>();
  if (native && dtype.kind() == 'f' && bits <= 64) return {kFloat, bits, 1};
  if (native && dtype.kind() == 'i') return {kInt, bits, 1};
  if (native && dtype.kind() == 'u') return {kUInt, bits, 1};
  PyErr_SetString(PyExc_BufferError, ("DLPack has no dtype for " + name).c_str());
  throw py::error_already_set();
}

template <typename M>
py::object export_as(const py::array& array, const char* name) {
  auto data = std::make_unique<Export<M>>();
  Tensor& tensor = data->managed.tensor;
  tensor.dtype = element_type(array.dtype());
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    data->shape.push_back(array.shape(i));
    data->strides.push_back(array.strides(i) / array.itemsize());
    if (array.strides(i) % array.itemsize() != 0) {
      PyErr_SetString(PyExc_BufferError, "DLPack counts strides in elements");
      throw py::error_already_set();
    }
  }
  tensor.data = const_cast<void*>(array.data());
  tensor.device = {kCpu, 0};
  tensor.ndim = int32_t(array.ndim());
  tensor.shape = data->shape.data();
  tensor.strides = data->strides.data();
  data->managed.context = data.get();
  data->managed.deleter = [](M* managed) {
    const GilHeld held;
    auto* context = static_cast<Export<M>*>(managed->context);
    Py_DECREF(context->array);
    delete context;
  };
  if constexpr (std::is_same_v<M, ManagedVersioned>) {
    data->managed.major = 1;
    data->managed.flags = array.writeable() ? 0 : kReadOnly;
  }
  PyObject* capsule = PyCapsule_New(&data->managed, name, [](PyObject* unused) {
    const char* given = PyCapsule_GetName(unused);  // who consumes a capsule renames it "used_..."
    if (std::strncmp(given, "dltensor", 8) != 0) return;
    auto* managed = static_cast<M*>(PyCapsule_GetPointer(unused, given));
    managed->deleter(managed);
  });
  if (!capsule) throw py::error_already_set();
  data->array = array.inc_ref().ptr();
  data.release();
  return py::reinterpret_steal<py::object>(capsule);
}

inline py::object export_array(const py::array& array, bool versioned) {
  if (versioned) return export_as<ManagedVersioned>(array, "dltensor_versioned");
  if (array.writeable()) return export_as<Managed>(array, "dltensor");
  PyErr_SetString(PyExc_BufferError, "a read-only array needs version 1 of DLPack");
  throw py::error_already_set();
}

}  // namespace dlpack
}  // namespace codellama_rt
