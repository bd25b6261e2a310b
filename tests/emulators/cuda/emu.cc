#include "emu.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <chrono>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda/runtime/runtime.h"

namespace codellama_rt {
namespace emu {
namespace {

constexpr size_t kStackBytes = 128 << 10, kMaxShared = 227 << 10;
constexpr int kPatience = 10000;  // rounds in which nobody gets anywhere

struct Fiber {
  Thread thread;
  ucontext_t start;  // the first time; then jump, which asks the system for nothing
  jmp_buf resume;
  bool started, done;
};

struct State {
  std::vector<Fiber> fibers{kMaxThreads};
  unsigned char* stacks = nullptr;
  std::unique_ptr<unsigned char[]> shared_memory{new unsigned char[kMaxShared + 1024]};
  Block block;
  Fiber* running = nullptr;
  jmp_buf scheduler;
  const std::function<void()>* kernel = nullptr;
  int idle_rounds = 0;
  std::vector<std::function<void()>>* captured = nullptr;
};

State& state() {
  static thread_local State state;
  return state;
}

void run_fiber() {
  State& s = state();
  (*s.kernel)();
  s.running->done = true;
  made_progress();
  _longjmp(s.scheduler, 1);
}

void resume(Fiber& fiber, unsigned char* stack) {
  State& s = state();
  s.running = &fiber;
  if (_setjmp(s.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = stack;
  fiber.start.uc_stack.ss_size = kStackBytes;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_fiber, 0);
  setcontext(&fiber.start);
}

void run_block(int num_threads) {
  State& s = state();
  for (int i = 0; i < num_threads; ++i) {
    Fiber& fiber = s.fibers[i];
    fiber.started = fiber.done = false;
    fiber.thread = {dim3(i, 0, 0), i};
  }
  for (bool alive = true; alive;) {
    alive = false;
    if (++s.idle_rounds > kPatience) throw std::runtime_error("emulated kernel: a deadlock");
    for (int i = 0; i < num_threads; ++i) {
      if (s.fibers[i].done) continue;
      resume(s.fibers[i], s.stacks + i * kStackBytes);
      alive = true;
    }
  }
}

void run_grid(const std::function<void()>& kernel, dim3 grid, int num_threads) {
  State& s = state();
  if (s.stacks == nullptr) {
    void* memory = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulated kernel: no memory for stacks");
    s.stacks = static_cast<unsigned char*>(memory);
  }
  const auto address = reinterpret_cast<uintptr_t>(s.shared_memory.get());
  s.kernel = &kernel;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        s.block = Block{};
        s.block.index = dim3(x, y, z);
        s.block.dim = dim3(num_threads);
        s.block.grid = grid;
        s.block.num_threads = num_threads;
        s.block.shared = reinterpret_cast<unsigned char*>((address + 1023) / 1024 * 1024);
        std::memset(s.block.shared, 0xff, kMaxShared);  // NaN: nothing is there before it is put
        s.idle_rounds = 0;
        run_block(num_threads);
      }
    }
  }
}

}  // namespace

Thread& thread() { return state().running->thread; }
Block& block() { return state().block; }
void made_progress() { state().idle_rounds = 0; }

void yield() {
  State& s = state();
  if (_setjmp(s.running->resume) == 0) _longjmp(s.scheduler, 1);
}

void enqueue(std::function<void()> work) {
  State& s = state();
  if (s.captured) {
    s.captured->push_back(std::move(work));
  } else {
    work();
  }
}

int last_threads = 0;

void launch(std::function<void()> kernel, dim3 grid, int num_threads, size_t shared_bytes) {
  if (num_threads % kWarp != 0 || num_threads > kMaxThreads || shared_bytes > kMaxShared ||
      grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error("emulated kernel: a launch that no device takes");
  }
  // For tests: a kernel that breaks the device, by a part of its parameters' name.
  const char* fault = std::getenv("CODELLAMA_RT_EMULATED_FAULT");
  if (fault && std::strstr(kernel.target_type().name(), fault)) std::abort();
  enqueue([=] { run_grid(kernel, grid, num_threads); });
  last_threads = num_threads;
}

// For tests: which of an op's kernels ran, by the threads of the last one's blocks.
extern "C" __attribute__((visibility("default"))) int emulated_threads() { return last_threads; }

}  // namespace emu

namespace cuda {

// The device is this process's memory; a stream does what it is given at once.
struct Probe {
  Device device{9, 0, 4, 227 << 10, false};
  std::string reason;

  Probe() {  // of a capability, "80", and of the image that its driver loads: of all, or PTX alone
    if (const char* asked = std::getenv("CODELLAMA_RT_EMULATED_CAPABILITY")) {
      device.major = asked[0] - '0';
    }
    const char* image = std::getenv("CODELLAMA_RT_EMULATED_IMAGE");
    const char* jit = std::getenv("CUDA_FORCE_PTX_JIT");
    const bool ptx = device.major != 9 || (image && *image == '8') || (jit && *jit == '1');
    reason = choose_kernels(&device, ptx ? 80 : 90);
  }
};
const Probe& probe() {
  static const Probe found;
  return found;
}
std::string unavailable_reason() { return probe().reason; }
std::string device_name() { return "emulated on the CPU"; }
const Device& device() {
  if (!probe().reason.empty()) throw std::runtime_error(probe().reason);
  return probe().device;
}
void* allocate(size_t bytes) { return ::operator new(bytes, std::align_val_t(1024)); }
void release(void* memory) { ::operator delete(memory, std::align_val_t(1024)); }
void* allocate_pinned(size_t bytes) { return allocate(bytes); }
void release_pinned(void* memory) { release(memory); }
void memory_info(size_t* free_bytes, size_t* total_bytes) {
  *free_bytes = *total_bytes = size_t(1) << 30;
}
void copy_async(void* to, const void* from, size_t bytes) {
  emu::enqueue([=] { std::memmove(to, from, bytes); });
}
void fill_async(void* memory, int byte, size_t bytes) {
  emu::enqueue([=] { std::memset(memory, byte, bytes); });
}
void* create_stream() { return reinterpret_cast<void*>(1); }
void destroy_stream(void*) {}
void synchronize() {}

using Graph = std::vector<std::function<void()>>;

void begin_capture() { emu::state().captured = new Graph; }
void* end_capture() { return std::exchange(emu::state().captured, nullptr); }
void launch_graph(void* graph) {
  for (const auto& work : *static_cast<Graph*>(graph)) work();
}
void destroy_graph(void* graph) { delete static_cast<Graph*>(graph); }
double elapsed_ms(const std::function<void()>& work) {
  const auto begin = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin)
      .count();
}

}  // namespace cuda
}  // namespace codellama_rt
