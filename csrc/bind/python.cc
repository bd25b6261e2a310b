// Direct calls from Python: tensors to the launchers, nothing else.
//
// An array is read through NumPy's own struct; a MindSpore Tensor through its Python methods
// (`data_ptr`, `shape`, `dtype`), so that no header or ABI of MindSpore is touched; any other
// tensor through DLPack. Kernels run in the caller's thread, with the GIL released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <iterator>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#ifndef CLRT_CUDA
#include "bind/dlpack.h"
#endif
#include "bind/gil.h"
#include "common/launch.h"
#ifdef CLRT_CUDA     // the module _cuda: the same ops on device tensors
#ifndef CLRT_MODULE  // the emulator has a name of its own
#define CLRT_MODULE _cuda
#endif
#include "cuda/runtime/module.h"
#else
#define CLRT_MODULE _core
#include "cpu/ops/decoder_layer.h"
#include "cpu/runtime/control_group.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/parallel.h"
#include "suffix/drafter.h"
#endif

namespace py = pybind11;

namespace codellama_rt {
namespace {

struct NamedDType {
  DType dtype;
  std::string name;
};

NamedDType named(std::string name) {
  if (name.compare(0, 6, "torch.") == 0) name.erase(0, 6);
  for (char& c : name) c = char(std::tolower(static_cast<unsigned char>(c)));
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kBFloat16, DType::kInt32}) {
    if (name == dtype_name(dtype)) return {dtype, name};
  }
  return {DType::kOther, name};
}

// Dtype objects live as long as their modules: each is asked for its name once. Under the GIL.
const NamedDType& dtype_of(py::handle dtype) {
  static auto* known = new std::unordered_map<PyObject*, NamedDType>;
  auto found = known->find(dtype.ptr());
  if (found == known->end()) {
    dtype.inc_ref();
    found = known->emplace(dtype.ptr(), named(py::str(dtype))).first;
  }
  return found->second;
}

// What Python code gives: an attribute, the result of a method. Such code may lose the GIL.
py::object attribute(py::handle object, const char* name) {
  PyObject* value = or_sleep_for_good([&] { return PyObject_GetAttrString(object.ptr(), name); });
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}
// The same by a name that was made once. A new one for each lookup takes as long as the lookup.
py::object attribute(py::handle object, PyObject* name) {
  PyObject* value = or_sleep_for_good([&] { return PyObject_GetAttr(object.ptr(), name); });
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}
py::object call(py::handle object, const char* method) {
  PyObject* value =
      or_sleep_for_good([&] { return PyObject_CallMethod(object.ptr(), method, nullptr); });
  if (!value) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(value);
}

// "torch.Tensor", "list": the type of an argument, for messages.
std::string type_name(py::handle object) {
  const py::handle type = py::type::handle_of(object);
  const std::string module = py::str(attribute(type, "__module__"));
  const std::string name = py::str(attribute(type, "__qualname__"));
  return module == "builtins" ? name : module + "." + name;
}

[[noreturn]] void fail_dims(int ndim) {
  throw std::invalid_argument("a tensor of an op has at most " + std::to_string(kMaxDims) +
                              " dimensions, got " + std::to_string(ndim));
}

#ifndef CLRT_CUDA
TensorView view_array(const py::array& array) {
  TensorView t;
  const NamedDType& dtype = dtype_of(array.dtype());
  t.dtype = dtype.dtype;
  t.dtype_text = dtype.name.c_str();
  t.ndim = int(array.ndim());
  if (t.ndim > kMaxDims) fail_dims(t.ndim);
  t.data = const_cast<void*>(array.data());
  t.writable = array.writeable();
  const int64_t bytes = array.itemsize();
  for (int i = 0; i < t.ndim; ++i) {
    t.shape[i] = array.shape(i);
    t.strides[i] = bytes > 0 && array.strides(i) % bytes == 0 ? array.strides(i) / bytes : -1;
  }
  return t;
}
#endif

// The shape of a contiguous tensor. A size that 64 bits cannot hold is left for the checks to
// refuse.
void set_shape(TensorView& t, const py::object& sizes) {
  const auto shape = py::reinterpret_steal<py::tuple>(PySequence_Tuple(sizes.ptr()));
  if (!shape) throw py::error_already_set();
  t.ndim = int(shape.size());
  if (t.ndim > kMaxDims) fail_dims(t.ndim);
  for (int i = 0; i < t.ndim; ++i) {
    const auto size = py::reinterpret_steal<py::object>(PyNumber_Index(shape[i].ptr()));
    if (!size) throw py::error_already_set();
    int overflow = 0;
    t.shape[i] = PyLong_AsLongLongAndOverflow(size.ptr(), &overflow);
    if (overflow != 0) t.shape[i] = overflow > 0 ? INT64_MAX : INT64_MIN;
  }
  set_contiguous_strides(t);
}

// Of a MindSpore Tensor; on cuda of a DeviceTensor, or of any Tensor there that knows its pointer.
void* memory_of(py::handle tensor) {
#ifdef CLRT_CUDA
  if (py::hasattr(tensor, "device_ptr")) {
    return reinterpret_cast<void*>(attribute(tensor, "device_ptr").cast<uintptr_t>());
  }
  if (!attribute(tensor, "is_cuda").cast<bool>())
    throw DtypeError("an op on cuda takes tensors there");
#endif
  return reinterpret_cast<void*>(call(tensor, "data_ptr").cast<uintptr_t>());
}

#ifndef CLRT_CUDA
// Other frameworks' tensors, which may lie anywhere, have a pointer as well.
bool is_mindspore(py::handle object) {
  return py::hasattr(object, "data_ptr") && py::hasattr(object, "asnumpy");
}
#endif

// What a call holds besides its arguments: the capsules of DLPack.
using Kept = std::vector<py::object>;

TensorView view_mindspore(py::handle tensor) {
  TensorView t;
  const NamedDType& dtype = dtype_of(attribute(tensor, "dtype"));
  t.dtype = dtype.dtype;
  t.dtype_text = dtype.name.c_str();
  set_shape(t, attribute(tensor, "shape"));
  if (!call(tensor, "is_contiguous").cast<bool>()) {
    throw std::invalid_argument("a MindSpore Tensor must be contiguous; call .contiguous()");
  }
  t.data = memory_of(tensor);
  return t;
}

// The bytes of a Quantized lie in one run. Those of a cache (num_blocks, n_kv_heads, bytes) may
// have gaps between what these two axes count: one head's part of a block is one piece.
void set_pieces(TensorView& t, const TensorView& payload) {
  bool apart = false, cache = t.ndim == 4 && payload.ndim >= 3;
  t.num_bytes = 1;
  for (int i = payload.ndim - 1; i >= 0; --i) {
    if (payload.shape[i] > 1 && payload.strides[i] != t.num_bytes) {
      apart = true;
      cache = cache && i < 2 && payload.strides[i] > 0;
    }
    if (i < 2) cache = cache && payload.shape[i] == t.shape[i];
    t.num_bytes *= payload.shape[i];
  }
  if (!apart || t.num_bytes == 0) return;
  if (!cache) {
    throw std::invalid_argument(
        "the payload of a Quantized must be contiguous; that of a cache (num_blocks, n_kv_heads, "
        "bytes) may have gaps between blocks and between heads, not between tokens");
  }
  const int64_t piece = t.num_bytes / (t.shape[0] * t.shape[1]);
  for (int i = 0; i < 2; ++i) {
    t.piece_strides[i] = t.shape[i] > 1 ? payload.strides[i] : piece;
  }
}

#ifdef CLRT_CUDA
TensorView view_bytes(py::handle payload, Kept&) { return view_mindspore(payload); }
#else
TensorView view_bytes(py::handle payload, Kept& kept) {
  if (py::isinstance<py::array>(payload)) {
    return view_array(py::reinterpret_borrow<py::array>(payload));
  }
  if (is_mindspore(payload)) return view_mindspore(payload);
  if (py::hasattr(payload, "__dlpack__")) return dlpack::view(payload, type_name(payload), kept);
  throw DtypeError(
      "the payload of a Quantized must be a NumPy array, a MindSpore Tensor or a tensor with "
      "DLPack, got " +
      type_name(payload));
}
#endif

// An ops.Quantized: bytes, and the dtype and shape of what they stand for.
TensorView view_quantized(py::handle object, Kept& kept) {
  static PyObject* const kPayload = PyUnicode_InternFromString("payload");
  static PyObject* const kDtype = PyUnicode_InternFromString("dtype");
  static PyObject* const kShape = PyUnicode_InternFromString("shape");
  const py::object held = attribute(object, kPayload);
  const TensorView payload = view_bytes(held, kept);
  TensorView t = payload;
  if (std::strcmp(t.dtype_text, "uint8") != 0) {
    throw DtypeError(std::string("the payload of a Quantized must be uint8, got ") + t.dtype_text);
  }
  const std::string name = attribute(object, kDtype).cast<std::string>();
  t.dtype = quantized_dtype(name.c_str());
  if (t.dtype == DType::kOther) {
    throw DtypeError("no quantised dtype is called '" + name + "'");
  }
  t.dtype_text = dtype_name(t.dtype);
  set_shape(t, attribute(object, kShape));
  set_pieces(t, payload);
  return t;
}

// Of `view`: the caller holds the object for the length of the call, which keeps its memory; what
// else must be held goes to `kept`.
#ifdef CLRT_CUDA
TensorView view(py::handle object, Kept& kept) {
  if (py::hasattr(object, "device_ptr")) return view_mindspore(object);
  if (py::hasattr(object, "payload")) return view_quantized(object, kept);
  if (py::hasattr(object, "is_cuda")) return view_mindspore(object);
  throw DtypeError("an op on cuda takes DeviceTensors, got " + type_name(object));
}
#else
// Whether it is one by the name of its type, which is asked first: to find that it lacks what other
// tensors have takes a microsecond.
bool is_named_quantized(py::handle object) {
  return std::strcmp(Py_TYPE(object.ptr())->tp_name, "Quantized") == 0 &&
         py::hasattr(object, "payload");
}

TensorView view(py::handle object, Kept& kept) {
  if (py::isinstance<py::array>(object)) {
    return view_array(py::reinterpret_borrow<py::array>(object));
  }
  if (is_named_quantized(object)) return view_quantized(object, kept);
  if (is_mindspore(object)) return view_mindspore(object);
  if (py::hasattr(object, "payload")) return view_quantized(object, kept);
  if (py::hasattr(object, "__dlpack__")) return dlpack::view(object, type_name(object), kept);
  throw DtypeError(
      "an op takes NumPy arrays, MindSpore Tensors or tensors with DLPack (__dlpack__), got " +
      type_name(object) +
      (py::hasattr(object, "data_ptr") ? "; pass a NumPy array that shares its memory" : ""));
}
#endif

template <typename Launch>
void run(const Launch& launch) {
  const GilReleased released;
  launch();
}

#ifndef CLRT_CUDA
// An op's argument num_threads, if there is one.
int limit_of(py::handle num_threads) {
  const auto index = py::reinterpret_steal<py::object>(PyNumber_Index(num_threads.ptr()));
  if (!index) throw py::error_already_set();
  int overflow = 0;
  const long long limit = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
  if (overflow < 0 || (overflow == 0 && limit < 1)) {
    throw std::invalid_argument("num_threads must be at least 1, got " +
                                std::string(py::str(index)));
  }
  return overflow > 0 || limit > INT_MAX ? INT_MAX : int(limit);
}

// On at most so many threads.
template <typename Launch>
void run(py::handle num_threads, const Launch& launch) {
  if (num_threads.is_none()) return run(launch);
  const ThreadLimit limit(limit_of(num_threads));
  run(launch);
}
#endif

// What Python passes for a parameter of a launcher: any tensor, or a sequence of them, or a number.
template <typename T>
struct Argument {
  using Type = T;
  static T read(T value, Kept&) { return value; }
};
template <>
struct Argument<TensorView> {
  using Type = py::handle;
  static TensorView read(py::handle object, Kept& kept) { return view(object, kept); }
};
template <>
struct Argument<Weights> {
  using Type = py::handle;
  static Weights read(py::handle object, Kept& kept) {
    Weights weights;
    if (PyTuple_Check(object.ptr()) || PyList_Check(object.ptr())) {
      for (py::handle weight : py::reinterpret_borrow<py::sequence>(object)) {
        weights.add(view(weight, kept));
      }
    } else {
      weights.add(view(object, kept));
    }
    return weights;
  }
};

// An op of ops.def: its arguments are read in order under the GIL, then it runs without. On the CPU
// the number of threads comes last.
template <typename... T>
void def(py::module_& m, const char* name, void (*launch)(T...)) {
#ifdef CLRT_CUDA
  m.def(name, [launch](typename Argument<T>::Type... arguments) {
    Kept kept;
    const std::tuple<T...> views{Argument<T>::read(arguments, kept)...};
    run([&] { std::apply(launch, views); });
  });
#else
  m.def(name, [launch](typename Argument<T>::Type... arguments, py::handle num_threads) {
    Kept kept;
    const std::tuple<T...> views{Argument<T>::read(arguments, kept)...};
    run(num_threads, [&] { std::apply(launch, views); });
  });
#endif
}

#ifndef CLRT_CUDA
// Its 19 tensors come as one tuple.
void def(py::module_& m, const char* name, void (*launch)(const DecoderLayer&)) {
  m.def(name, [launch](const py::tuple& inputs, float eps, bool interleaved, py::handle out,
                       py::handle num_threads) {
    Kept kept;
    if (inputs.size() != 19) throw std::invalid_argument("decoder_layer takes 19 tensors");
    TensorView t[19];
    for (size_t i = 0; i < 19; ++i) t[i] = view(inputs[i], kept);
    const DecoderLayer layer{
        t[0],  t[1],       t[2],  t[3],  t[4],  t[5],  t[6],  t[7],  t[8],  t[9],
        t[10], t[11],      t[12], t[13], t[14], t[15], t[16], t[17], t[18], view(out, kept),
        eps,   interleaved};
    run(num_threads, [&] { launch(layer); });
  });
}
#endif

#ifndef CLRT_CUDA
// Of a tensor with DLPack: (shape, name of the dtype).
py::tuple shape_and_dtype(py::handle object) {
  Kept kept;
  const TensorView t = dlpack::view(object, type_name(object), kept);
  py::tuple shape(t.ndim);
  for (int i = 0; i < t.ndim; ++i) shape[i] = t.shape[i];
  return py::make_tuple(shape, t.dtype_text);
}

std::vector<std::string> isa_names() {
  size_t n = 0;
  const KernelTable* const* tables = available_isas(&n);
  std::vector<std::string> names;
  for (size_t i = 0; i < n; ++i) names.push_back(tables[i]->isa);
  return names;
}

// The sets of a CPU that is described, best first: the choice can be tested without that CPU.
std::vector<const char*> isas_of_cpu(const std::string& vendor,
                                     const std::vector<std::string>& features) {
  const auto has = [&](const char* name) {
    return std::find(features.begin(), features.end(), name) != features.end();
  };
  return isas_of({vendor, has("avx2"), has("avx512"), has("avx512_vnni"), has("avx512_bf16")});
}

void choose_isa(const std::string& name) {
  if (set_isa(name.c_str())) return;
  std::string names;
  for (const std::string& isa : isa_names()) names += " " + isa;
  throw std::invalid_argument("instruction set '" + name +
                              "' is not available; available:" + names);
}

// Operations done by all threads; 0 if the instruction set lacks the instruction.
int64_t repeat_instruction(const std::string& isa, const std::string& name, int64_t num_rounds) {
  size_t n = 0, which = 0;
  const KernelTable* const* tables = available_isas(&n);
  const KernelTable* const* table =
      std::find_if(tables, tables + n, [&](const KernelTable* t) { return t->isa == isa; });
  while (which < std::size(kArithmeticNames) && kArithmeticNames[which] != name) ++which;
  if (table == tables + n || which == std::size(kArithmeticNames)) {
    throw std::invalid_argument("no instruction '" + name + "' of the instruction set '" + isa +
                                "' is known here");
  }
  int64_t operations = 0;
  run([&] { operations = (*table)->multiply_add(Arithmetic(which), num_rounds); });
  return operations;
}

void choose_num_threads(int64_t n) {
  if (n < 1 || n > INT32_MAX) {
    throw std::invalid_argument(std::string("num_threads must be at ") +
                                (n < 1 ? "least 1" : "most 2147483647") + ", got " +
                                std::to_string(n));
  }
  set_num_threads(int(n));
}

void append_tokens(SuffixAutomaton& text, const py::buffer& tokens) {
  const py::buffer_info info = tokens.request();
  if (info.ndim != 1 || !info.item_type_is_equivalent_to<int32_t>() ||
      info.strides[0] != info.itemsize) {
    throw std::invalid_argument("SuffixAutomaton.extend: tokens must be contiguous int32");
  }
  const auto* begin = static_cast<const int32_t*>(info.ptr);
  for (py::ssize_t i = 0; i < info.size; ++i) text.append(begin[i]);
}

void add_suffixes(py::module_& m) {
  py::class_<SuffixAutomaton, std::shared_ptr<SuffixAutomaton>>(m, "SuffixAutomaton")
      .def(py::init<>())
      .def("extend", append_tokens, py::arg("tokens"))
      .def("__len__", &SuffixAutomaton::size)
      .def_property_readonly("num_bytes", &SuffixAutomaton::num_bytes);
  py::class_<SuffixDrafter>(m, "SuffixDrafter")
      .def(py::init([](std::shared_ptr<SuffixAutomaton> prompt,
                       const std::vector<std::shared_ptr<SuffixAutomaton>>& others) {
             const std::vector<SuffixDrafter::Text> texts(others.begin(), others.end());
             return std::make_unique<SuffixDrafter>(std::move(prompt), texts);
           }),
           py::arg("prompt"), py::arg("others"))
      .def("__len__", &SuffixDrafter::size)
      .def(
          "push",
          [](SuffixDrafter& drafter, int32_t token_id) {
            const SuffixDrafter::Outcome outcome = drafter.push(token_id);
            return py::make_tuple(outcome.length, outcome.is_hit);
          },
          py::arg("token_id"))
      .def(
          "propose",
          [](const SuffixDrafter& drafter, int32_t most) {
            const SuffixDrafter::Draft draft = drafter.propose(most);
            return py::make_tuple(draft.length, py::cast(draft.tokens));
          },
          py::arg("most"));
}
#endif

}  // namespace

PYBIND11_MODULE(CLRT_MODULE, m) {
  m.doc() = "Direct calls to the kernels; codellama_rt.ops is the documented surface.";
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const DtypeError& e) {
      py::set_error(PyExc_TypeError, e.what());
    }
  });
#define CLRT_OP(name, Params, signature) def(m, #name, launch::name);
#define CLRT_COMPOSED_OP(name, signature) def(m, #name, launch::name);
#define CLRT_DIRECT_OP(name, Params, signature) def(m, #name, launch::name);
#include "ops.def"
#ifdef CLRT_CUDA
  cuda::add_runtime(m);
#else
  m.def("read_memory", [](const py::array& memory) {
    if (!(memory.flags() & py::array::c_style)) {
      throw std::invalid_argument("read_memory: memory must be contiguous");
    }
    const void* data = memory.data();
    const int64_t bytes = memory.nbytes();
    run([&] { kernels().read_memory(data, bytes); });
  });
  m.def("multiply_add", repeat_instruction);
  m.attr("INSTRUCTIONS") =
      std::vector<std::string>(std::begin(kArithmeticNames), std::end(kArithmeticNames));
  m.def("shape_and_dtype", shape_and_dtype);
  m.def("dlpack_capsule", dlpack::export_array);
  m.def("available_isas", isa_names);
  m.def("isas_of", isas_of_cpu, py::arg("vendor"), py::arg("features"));
  m.def("isa", [] { return kernels().isa; });
  m.def("set_isa", choose_isa);
  m.def("control_groups", control_groups, py::arg("controller"), py::arg("root") = "");
  m.def("cpu_quota", cpu_quota, py::arg("root") = "");
  m.def("num_threads", num_threads);
  m.def("set_num_threads", choose_num_threads);
  add_suffixes(m);
#endif
}

}  // namespace codellama_rt
