// The CPU kernels of another processor, called through a pipe: ops in, results out.
//
// A request is a line "op tensors scalars", a line of the scalars, and for each tensor a line
// "buffer dtype quantized writable num_bytes ndim sizes... strides..."; before them, a line
// "buffers n" and for each "bytes", its bytes. The answer is "ok" and all buffers, or the kind of
// exception, its length and its text. Run under qemu-user by kernel_proxy.py.
#include <cstdio>
#include <cstring>
#include <iostream>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "common/launch.h"
#include "cpu/runtime/dispatch.h"
#include "cpu/runtime/parallel.h"

using namespace codellama_rt;

namespace {

using Buffers = std::vector<std::vector<char>>;

struct Call {
  std::vector<TensorView> t;
  std::vector<double> s;
};

DType dtype_of(const std::string& name, bool quantized) {
  for (DType d = DType::kFloat32; d != DType::kOther; d = DType(int(d) + 1)) {
    if (name == dtype_name(d) && quantized == (d >= DType::kInt8)) return d;
  }
  return DType::kOther;
}

std::istringstream read_line() {
  std::string line;
  if (!std::getline(std::cin, line)) std::exit(0);
  return std::istringstream(line);
}

Buffers read_buffers() {
  std::string word;
  size_t count;
  read_line() >> word >> count;
  Buffers buffers(count);
  for (auto& buffer : buffers) {
    size_t bytes;
    read_line() >> bytes;
    buffer.resize(bytes + 64);  // an op may look at where an empty tensor lies
    std::cin.read(buffer.data(), std::streamsize(bytes));
    buffer.resize(bytes);
  }
  return buffers;
}

TensorView read_tensor(Buffers* buffers) {
  static std::vector<std::string> names(64);  // dtype_text points into it for the call
  static size_t next = 0;
  std::string& name = names[next++ % names.size()];
  std::istringstream line = read_line();
  size_t buffer;
  bool quantized;
  TensorView t;
  line >> buffer >> name >> quantized >> t.writable >> t.num_bytes >> t.ndim;
  for (int i = 0; i < t.ndim; ++i) line >> t.shape[i];
  for (int i = 0; i < t.ndim; ++i) line >> t.strides[i];
  t.data = (*buffers)[buffer].data();
  t.dtype = dtype_of(name, quantized);
  t.dtype_text = name.c_str();
  return t;
}

// A launcher's arguments in order, from the call's tensors and scalars.
struct Arguments {
  const Call& call;
  size_t tensor = 0, scalar = 0;

  TensorView next(TensorView*) { return call.t[tensor++]; }
  Weights next(Weights*) {
    Weights weights;
    while (tensor + 1 < call.t.size()) weights.add(call.t[tensor++]);
    return weights;
  }
  template <typename Number>
  Number next(Number*) {
    return Number(call.s[scalar++]);
  }
};

template <typename... T>
void run(void (*launch)(T...), const Call& call) {
  Arguments from{call};
  const std::tuple<T...> arguments{from.next(static_cast<T*>(nullptr))...};
  std::apply(launch, arguments);
}
void run(void (*)(const DecoderLayer&), const Call&) { throw std::logic_error("not served"); }

void call_op(const std::string& op, const Call& call) {
  if (op == "set_num_threads") return set_num_threads(int(call.s[0]));
#define CLRT_OP(name, Params, signature) \
  if (op == #name) return run(launch::name, call);
#define CLRT_COMPOSED_OP(name, signature) CLRT_OP(name, , signature)
#define CLRT_DIRECT_OP(name, Params, signature) CLRT_OP(name, Params, signature)
#include "ops.def"
  throw std::logic_error("no op is called " + op);
}

void serve_one() {
  Buffers buffers = read_buffers();
  std::string name, error, kind;
  size_t tensors, scalars;
  read_line() >> name >> tensors >> scalars;
  Call call;
  call.s.resize(scalars);
  std::istringstream values = read_line();
  std::string word;  // >> takes neither nan nor inf
  for (double& value : call.s) {
    values >> word;
    value = std::strtod(word.c_str(), nullptr);
  }
  for (size_t i = 0; i < tensors; ++i) call.t.push_back(read_tensor(&buffers));
  try {
    call_op(name, call);
  } catch (const DtypeError& e) {
    kind = "TypeError", error = e.what();
  } catch (const std::invalid_argument& e) {
    kind = "ValueError", error = e.what();
  }
  if (kind.empty()) {
    std::cout << "ok\n";
    for (const auto& buffer : buffers) {
      std::cout.write(buffer.data(), std::streamsize(buffer.size()));
    }
  } else {
    std::cout << kind << " " << error.size() << "\n" << error;
  }
  std::cout.flush();
}

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  std::cout << kernels().isa << std::endl;
  for (;;) serve_one();
}
