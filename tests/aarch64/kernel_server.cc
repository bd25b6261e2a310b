// The CPU kernels of another processor, called through a pipe: ops in, results out.
//
// A request is a line "op tensors scalars", a line of the scalars, and for each tensor a line
// "buffer dtype quantized writable num_bytes ndim sizes... strides..."; before them, a line
// "buffers n" and for each "bytes", its bytes. The answer is "ok" and all buffers, or the kind of
// exception, its length and its text. Run under qemu-user by kernel_proxy.py.
#include <cstdio>
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
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

const std::map<std::string, std::function<void(const Call&)>>& ops() {
  using C = const Call&;
  static const std::map<std::string, std::function<void(C)>> all = {
      {"embedding", [](C c) { launch::embedding(c.t[0], c.t[1], c.t[2]); }},
      {"rms_norm", [](C c) { launch::rms_norm(c.t[0], c.t[1], float(c.s[0]), c.t[2]); }},
      {"add_rms_norm",
       [](C c) { launch::add_rms_norm(c.t[0], c.t[1], c.t[2], float(c.s[0]), c.t[3], c.t[4]); }},
      {"linear", [](C c) { launch::linear(c.t[0], &c.t[1], int(c.t.size()) - 2, c.t.back()); }},
      {"quantize", [](C c) { launch::quantize(c.t[0], c.t[1]); }},
      {"apply_rotary_pos_emb",
       [](C c) {
         launch::apply_rotary_pos_emb(c.t[0], c.t[1], c.t[2], c.t[3], c.t[4], c.s[0] != 0);
       }},
      {"reshape_and_cache",
       [](C c) { launch::reshape_and_cache(c.t[0], c.t[1], c.t[2], c.t[3], c.t[4]); }},
      {"rope_and_cache",
       [](C c) {
         launch::rope_and_cache(c.t[0], c.t[1], c.t[2], c.t[3], c.t[4], c.t[5], c.t[6], c.s[0] != 0,
                                c.t[7]);
       }},
      {"flash_attention",
       [](C c) {
         launch::flash_attention(c.t[0], c.t[1], c.t[2], c.t[3], c.t[4], c.s[0] != 0, float(c.s[1]),
                                 c.t[5], c.t[6]);
       }},
      {"paged_attention",
       [](C c) {
         launch::paged_attention(c.t[0], c.t[1], c.t[2], c.t[3], c.t[4], c.t[5], float(c.s[0]),
                                 c.t[6], c.t[7]);
       }},
      {"merge_attention",
       [](C c) { launch::merge_attention(c.t[0], c.t[1], c.t[2], c.t[3], c.t[4], c.t[5]); }},
      {"silu_and_mul", [](C c) { launch::silu_and_mul(c.t[0], c.t[1]); }},
      {"copy_blocks", [](C c) { launch::copy_blocks(c.t[0], c.t[1], c.t[2]); }},
      {"set_num_threads", [](C c) { set_num_threads(int(c.s[0])); }},
  };
  return all;
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
    ops().at(name)(call);
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
