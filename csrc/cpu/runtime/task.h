// What every kernel's launcher starts with: from a dtype to a type, from a lambda to tasks.
// Compiled inside an instruction set's namespace.
#pragma once

#include "common/dtype.h"
#include "cpu/runtime/parallel.h"

namespace codellama_rt {
namespace CLRT_ISA {
namespace {

template <typename Body>
inline void for_each_task(int64_t num_tasks, const Body& body) {
  parallel_for(
      num_tasks, [](void* context, int64_t task) { (*static_cast<const Body*>(context))(task); },
      const_cast<Body*>(&body));
}

// Calls body with a value of the storage type of a float dtype: its type is what counts.
template <typename Body>
inline void with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat16:
      return body(f16{});
    case DType::kBFloat16:
      return body(bf16{});
    default:
      return body(float{});
  }
}

// Tasks of a pass over memory: an even number of at most 512 KiB, for the first lines of a task are
// fetched late (over tasks of 128 KiB one token's product with int4 weights reached 72 to 89 % of
// what memory gives, now 81 to 93 %); or one, where two threads are no faster.
inline int64_t num_stream_tasks(int64_t bytes) {
  return bytes < (256 << 10) ? 1 : 2 * ((bytes + (1 << 20) - 1) / (1 << 20));
}

// Rows a task takes so that it moves about 32 KiB: less is lost in handing out, more in waiting.
inline int64_t rows_per_task(int64_t row_bytes) {
  const int64_t rows = 32768 / (row_bytes + 1);
  return rows < 1 ? 1 : rows;
}

template <typename Body>
inline void for_each_row(int64_t num_rows, int64_t row_bytes, const Body& body) {
  const int64_t step = rows_per_task(row_bytes);
  for_each_task((num_rows + step - 1) / step, [&](int64_t task) {
    const int64_t end = task * step + step < num_rows ? task * step + step : num_rows;
    for (int64_t row = task * step; row < end; ++row) body(row);
  });
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace
}  // namespace CLRT_ISA
}  // namespace codellama_rt
