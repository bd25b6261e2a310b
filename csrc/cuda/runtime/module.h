// What the module _cuda offers beside the ops: memory, copies, streams and graphs of the device.
#pragma once

#include <pybind11/pybind11.h>

namespace codellama_rt {
namespace cuda {

void add_runtime(pybind11::module_& m);

}  // namespace cuda
}  // namespace codellama_rt
