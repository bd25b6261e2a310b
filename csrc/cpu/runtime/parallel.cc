#include "cpu/runtime/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "cpu/runtime/control_group.h"
#include "cpu/runtime/float_mode.h"
#include "cpu/runtime/pool.h"

namespace codellama_rt {
namespace {

// CPUs in the affinity mask, whose size the kernel knows and programs guess.
int num_affine_cpus() {
  for (int most = 1024; most <= 1 << 20; most *= 2) {
    cpu_set_t* set = CPU_ALLOC(most);
    const size_t bytes = CPU_ALLOC_SIZE(most);
    const bool fits = set && sched_getaffinity(0, bytes, set) == 0;
    const int count = fits ? CPU_COUNT_S(bytes, set) : 0;
    CPU_FREE(set);
    if (fits) return count;
  }
  return 1;
}

int num_threads_from(const std::string& text) {
  const bool digits = text.find_first_not_of("0123456789") == std::string::npos;
  const long long n = digits && text.size() < 10 ? std::atoll(text.c_str()) : 0;
  if (n >= 1) return int(n);
  throw std::invalid_argument("CODELLAMA_RT_NUM_THREADS=" + text +
                              ": expected a whole number of threads, at least 1");
}

// CPUs that this process may run on, and no more than its control group has time for: threads that
// share one CPU's time wait for one another at the end of every region. Part of a CPU counts as
// one.
int default_num_threads() {
  const char* text = std::getenv("CODELLAMA_RT_NUM_THREADS");
  if (text && *text) return num_threads_from(text);
  const int cpus = num_affine_cpus();
  const double quota = std::ceil(cpu_quota());
  return quota < cpus ? int(quota) : cpus;
}

std::mutex busy;  // held by the thread whose region the pool runs
std::atomic<int> wanted_threads{0};
Pool* pool = nullptr;  // started by the first region that wants it; never ended, for threads may
int pool_threads = 0;  // still be inside when the process exits
thread_local int thread_limit = INT_MAX;  // of the operators that this thread calls

struct Inside {
  Inside() { inside = true; }
  ~Inside() { inside = false; }
};

// A forked child has none of its parent's threads: it forgets the pool and starts its own.
void forget_pool() {
  pool = nullptr;
  pool_threads = 0;
  new (&busy) std::mutex;
}
[[maybe_unused]] const int forgets = pthread_atfork(nullptr, nullptr, forget_pool);

void start_pool(int threads) {
  pool_threads = 0;
  delete std::exchange(pool, nullptr);  // first, so that there are never more threads than wanted
  pool = new Pool(threads - 1);
  pool_threads = threads;
}

int usual_num_threads() {
  int n = wanted_threads.load(std::memory_order_relaxed);
  if (n != 0) return n;
  const int usual = default_num_threads();
  return wanted_threads.compare_exchange_strong(n, usual) ? usual : n;  // another may have set it
}

}  // namespace

void parallel_for(int64_t num_tasks, void (*body)(void*, int64_t), void* context) {
  const DefaultFloatMode mode;
  const int threads = usual_num_threads();
  const int helpers = (threads < thread_limit ? threads : thread_limit) - 1;
  std::unique_lock<std::mutex> lock(busy, std::defer_lock);
  if (num_tasks <= 1 || helpers == 0 || inside || !lock.try_lock()) {
    for (int64_t task = 0; task < num_tasks; ++task) body(context, task);
    return;
  }
  if (pool_threads != threads) start_pool(threads);
  const Inside here;
  pool->run({body, context, num_tasks, helpers});
}

int num_threads() {
  const int usual = usual_num_threads();
  return usual < thread_limit ? usual : thread_limit;
}

void set_num_threads(int n) { wanted_threads.store(n); }

ThreadLimit::ThreadLimit(int most) : found_(thread_limit) {
  if (most < thread_limit) thread_limit = most;
}
ThreadLimit::~ThreadLimit() { thread_limit = found_; }

struct Arena {
  void* memory = nullptr;
  size_t bytes = 0;

  Arena() = default;
  Arena(const Arena&) = delete;
  ~Arena() { std::free(memory); }

  // Room for so many; what it held is lost if it grows.
  void* of(size_t least) {
    if (bytes >= least) return memory;
    std::free(memory);
    memory = nullptr;
    bytes = 0;
    if (least > PTRDIFF_MAX - 4096) throw std::bad_alloc();
    const size_t rounded = (least + 4095) / 4096 * 4096;
    memory = std::aligned_alloc(4096, rounded);
    if (!memory) throw std::bad_alloc();
    bytes = rounded;
    return memory;
  }
};

void* scratch(Scratch slot, size_t bytes) {
  thread_local Arena arenas[3];
  return arenas[int(slot)].of(bytes);
}

namespace {
// Of no call. Without a lock, which a forked child might find taken; never freed.
std::atomic<Arena*> unlent[64];
}  // namespace

LentMemory::LentMemory(size_t bytes) : arena_(nullptr) {
  for (auto& slot : unlent) {
    if ((arena_ = slot.exchange(nullptr))) break;
  }
  if (!arena_) arena_ = new Arena;
  try {
    arena_->of(bytes);
  } catch (...) {
    delete arena_;
    throw;
  }
}
LentMemory::~LentMemory() {
  for (auto& slot : unlent) {
    Arena* none = nullptr;
    if (slot.compare_exchange_strong(none, arena_)) return;
  }
  delete arena_;
}
void* LentMemory::data() const { return arena_->memory; }

}  // namespace codellama_rt
