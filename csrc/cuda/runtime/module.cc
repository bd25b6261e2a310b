#include "cuda/runtime/module.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include "bind/dlpack.h"
#include "bind/gil.h"
#include "cuda/runtime/runtime.h"

namespace py = pybind11;

namespace codellama_rt {
namespace cuda {
namespace {

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }
uintptr_t address(const void* memory) { return reinterpret_cast<uintptr_t>(memory); }

struct Shared {
  dlpack::Managed managed;
  std::vector<int64_t> shape;
  py::object owner;
};

// On any thread of the consumer, at any time: once the interpreter ends, its memory ends with it.
void delete_shared(dlpack::Managed* managed) {
  if (!Py_IsInitialized()) return;
  const GilHeld gil;
  auto* shared = static_cast<Shared*>(managed->context);
  PyObject* owner = shared->owner.release().ptr();
  delete shared;
  or_sleep_for_good([&] { Py_XDECREF(owner); });
}

// The consumer renames the capsule it took; one that nobody took is freed with it.
void delete_capsule(PyObject* capsule) {
  if (!PyCapsule_IsValid(capsule, "dltensor")) return;
  auto* managed = static_cast<dlpack::Managed*>(PyCapsule_GetPointer(capsule, "dltensor"));
  managed->deleter(managed);
}

py::object exported(uintptr_t data, std::vector<int64_t> shape, int code, int bits,
                    py::object owner) {
  auto* shared = new Shared{{}, std::move(shape), std::move(owner)};
  dlpack::Tensor& t = shared->managed.tensor;
  t.data = pointer(data);
  t.device = {dlpack::kCuda, 0};
  t.ndim = int32_t(shared->shape.size());
  t.dtype = {uint8_t(code), uint8_t(bits), 1};
  t.shape = shared->shape.data();
  shared->managed.context = shared;
  shared->managed.deleter = delete_shared;
  return py::reinterpret_steal<py::object>(
      PyCapsule_New(&shared->managed, "dltensor", delete_capsule));
}

}  // namespace

void add_runtime(py::module_& m) {
  m.def("unavailable_reason", unavailable_reason);
  m.def("device_name", device_name);
  m.def("memory_info", [] {
    size_t free_bytes = 0, total_bytes = 0;
    memory_info(&free_bytes, &total_bytes);
    return py::make_tuple(free_bytes, total_bytes);
  });
  m.def("allocate", [](size_t bytes) { return address(allocate(bytes)); });
  m.def("release", [](uintptr_t memory) { release(pointer(memory)); });
  m.def("allocate_pinned", [](size_t bytes) { return address(allocate_pinned(bytes)); });
  m.def("release_pinned", [](uintptr_t memory) { release_pinned(pointer(memory)); });
  m.def("set_stream", [](uintptr_t stream) { set_stream(pointer(stream)); });
  m.def("stream", [] { return address(stream()); });
  m.def("create_stream", [] { return address(create_stream()); });
  m.def("destroy_stream", [](uintptr_t stream) { destroy_stream(pointer(stream)); });
  m.def("copy_async", [](uintptr_t to, uintptr_t from, size_t bytes) {
    copy_async(pointer(to), pointer(from), bytes);
  });
  m.def("fill_async",
        [](uintptr_t memory, int byte, size_t bytes) { fill_async(pointer(memory), byte, bytes); });
  m.def("synchronize", synchronize, py::call_guard<GilReleased>());
  m.def("begin_capture", begin_capture);
  m.def("end_capture", [] { return address(end_capture()); });
  m.def("launch_graph", [](uintptr_t graph) { launch_graph(pointer(graph)); });
  m.def("destroy_graph", [](uintptr_t graph) { destroy_graph(pointer(graph)); });
  m.def("elapsed_ms", elapsed_ms);
  m.def("set_workspace",
        [](uintptr_t memory, size_t bytes) { set_workspace(pointer(memory), bytes); });
  m.def("workspace", [] { return address(workspace().memory); });
  m.def("set_decode_warps", set_decode_warps);
  m.def("read_sum", [](uintptr_t memory, size_t bytes, uintptr_t out) {
    read_sum(pointer(memory), bytes, static_cast<float*>(pointer(out)));
  });
  m.def("dlpack", exported);
}

}  // namespace cuda
}  // namespace codellama_rt
