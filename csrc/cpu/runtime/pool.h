// The threads of parallel_for: how a region's tasks are dealt, taken over, and waited for.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu/runtime/float_mode.h"

namespace codellama_rt {

// A sleeping worker costs a wake-up of 5 to 50 us, as much as a small op, and more where other
// programs want its CPU; so a worker spins this many pauses (about 50 us) after a region before it
// sleeps. Layers follow within that time. While others are still at the region's last tasks, which
// may take longer, a pause counts a twentieth.
constexpr int kSpins = 2000, kOpenShare = 20;

inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

inline thread_local bool inside = false;  // a region: those within it run on this thread alone

// One region of work, and how many workers may help its caller.
struct Region {
  void (*body)(void*, int64_t) = nullptr;
  void* context = nullptr;
  int64_t num_tasks = 0;
  int num_helpers = 0;
};

// Tasks [first, end) that wait for their thread, below 2^32.
struct Tasks {
  int64_t first, end;
  int64_t count() const { return end - first; }
};

// A thread's tasks, in one word: what another takes away is taken at once.
class alignas(64) Share {
 public:
  Tasks load() const {
    const uint64_t word = word_.load();
    return {int64_t(word >> 32), int64_t(word & UINT32_MAX)};
  }
  void store(Tasks tasks) { word_.store(word_of(tasks)); }
  bool replace(Tasks seen, Tasks by) {
    uint64_t word = word_of(seen);
    return word_.compare_exchange_strong(word, word_of(by));
  }

 private:
  static uint64_t word_of(Tasks tasks) { return uint64_t(tasks.first) << 32 | uint64_t(tasks.end); }
  std::atomic<uint64_t> word_{0};
};

// A region ends when its tasks are done: workers that have not come by then, because something else
// has their CPUs, are not waited for.
//
// `generation_` is odd while a region is open, and 64 bits wide: it never comes back to a value
// that a sleeping worker has seen. `inside_` counts the workers that may read the region. A worker
// first counts itself, then looks whether a region is open; the caller first shuts the region, then
// waits for the count to be 0. All four steps are sequentially consistent, so either the worker
// sees that the region is shut and touches nothing, or the caller sees the worker and waits. If the
// worker finds another region open than the one that woke it, that one is as good: its caller must
// wait for it as well.
//
// Each thread begins with an equal share of neighbouring tasks, and one that has none left takes
// over the later half of the largest share: neighbours are mostly neighbours in memory, so a thread
// reads on where it was. Two threads that read tasks of 512 KB in turn got 51 GB/s, and read on 60
// (AMD EPYC, Zen 4).
class Pool {
 public:
  // Throws std::runtime_error, with no thread left over, if one cannot be started. Returns when all
  // have their thread-local memory: glibc makes it at its first use, and aborts if it cannot.
  explicit Pool(int num_workers) : shares_(num_workers + 1) {
    try {
      workers_.reserve(num_workers);
      while (int(workers_.size()) < num_workers) workers_.emplace_back([this] { work(); });
    } catch (const std::exception& error) {
      const size_t started = workers_.size();
      stop();
      throw std::runtime_error("thread " + std::to_string(started + 2) +
                               " of num_threads=" + std::to_string(num_workers + 1) +
                               " cannot be started (" + error.what() +
                               "); set fewer (set_num_threads, CODELLAMA_RT_NUM_THREADS)");
    }
    while (ready_.load() < num_workers) sched_yield();
  }
  ~Pool() { stop(); }

  // An exception of a task, on whatever thread, ends the region and is thrown here.
  void run(const Region& region) {
    region_ = region;
    failed_.store(false, std::memory_order_relaxed);
    const int64_t threads = region.num_helpers + 1, tasks = region.num_tasks;
    for (int64_t i = 0; i < threads; ++i) {
      shares_[i].store({tasks * i / threads, tasks * (i + 1) / threads});
    }
    helpers_.store(0, std::memory_order_relaxed);
    generation_.fetch_add(1);  // opens it, and publishes the lines above
    if (sleepers_.load() > 0) {
      std::lock_guard<std::mutex> lock(sleep_);
      wake_.notify_all();
    }
    drain(region, 0);
    generation_.fetch_add(1);  // shuts it
    for (int spins = 0; inside_.load() > 0; ++spins) {
      if (spins < kSpins) {
        pause_cpu();
      } else {
        sched_yield();
      }
    }
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  static bool is_open(uint64_t generation) { return generation % 2 == 1; }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(sleep_);
      stop_.store(true);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }

  void drain(const Region& region, int64_t own) {
    try {
      for (int64_t task; (task = take(own, region.num_helpers + 1)) >= 0;) {
        region.body(region.context, task);
      }
    } catch (...) {
      failed_.store(true, std::memory_order_relaxed);  // no thread begins another task
      std::lock_guard<std::mutex> lock(sleep_);
      if (!error_) error_ = std::current_exception();
    }
  }

  // The next task of a thread's own, or the first of those that it takes over; -1: none is left.
  int64_t take(int64_t own, int64_t threads) {
    if (failed_.load(std::memory_order_relaxed)) return -1;
    Share& mine = shares_[own];
    for (Tasks left = mine.load(); left.count() > 0; left = mine.load()) {
      if (mine.replace(left, {left.first + 1, left.end})) return left.first;
    }
    for (;;) {
      Tasks most{0, 0};
      Share* whose = nullptr;
      for (int64_t i = 0; i < threads; ++i) {
        const Tasks left = shares_[i].load();
        if (left.count() > most.count()) most = left, whose = &shares_[i];
      }
      if (!whose) return -1;
      const int64_t middle = most.first + most.count() / 2;
      if (!whose->replace(most, {most.first, middle})) continue;
      mine.store({middle + 1, most.end});
      return middle;
    }
  }

  void work() {
    const DefaultFloatMode mode;
    inside = true;
    ready_.fetch_add(1);
    for (uint64_t seen = 0; await(seen);) {
      inside_.fetch_add(1);
      seen = generation_.load();
      if (is_open(seen)) help();
      inside_.fetch_sub(1);
    }
  }

  void help() {
    const Region region = region_;
    const int helper = helpers_.fetch_add(1, std::memory_order_relaxed);
    if (helper < region.num_helpers) drain(region, helper + 1);
  }

  // Until a region is open that is not `seen`; false when the pool ends.
  bool await(uint64_t seen) {
    for (int spins = 0; spins < kSpins * kOpenShare;) {
      if (is_new(seen)) return true;
      if (stop_.load(std::memory_order_relaxed)) return false;
      pause_cpu();
      spins += is_open(generation_.load(std::memory_order_relaxed)) ? 1 : kOpenShare;
    }
    std::unique_lock<std::mutex> lock(sleep_);
    sleepers_.fetch_add(1);
    // Not wake_.wait(lock): GCC 12's asks for a libstdc++ newer than that of manylinux_2_34.
    while (!is_new(seen) && !stop_.load()) {
      pthread_cond_wait(wake_.native_handle(), sleep_.native_handle());
    }
    sleepers_.fetch_sub(1);
    return !stop_.load();
  }

  bool is_new(uint64_t seen) const {
    const uint64_t now = generation_.load();  // in one order with `sleepers_`: no wake-up is lost
    return is_open(now) && now != seen;
  }

  Region region_;             // written while no region is open and no worker inside
  std::exception_ptr error_;  // the first of a region; under `sleep_` until nobody is inside
  alignas(64) std::atomic<uint64_t> generation_{0};
  std::vector<Share> shares_;  // one of each thread, the caller's first
  std::atomic<bool> failed_{false};
  alignas(64) std::atomic<int> inside_{0};
  std::atomic<int> helpers_{0};  // workers that came into this region, in time or too many
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int> ready_{0};  // workers that have begun
  std::mutex sleep_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

}  // namespace codellama_rt
