// A pool of threads for the kernels: neighbouring tasks each, halves taken over, no OpenMP.
//
// MindSpore calls kernels from threads of its own, a different one each call; OpenMP would start a
// team for every caller. Here all callers share one pool. A caller that finds it busy (or that is
// itself inside a parallel region) works alone: kernels give the same bits however tasks are dealt.
#pragma once

#include <cstddef>
#include <cstdint>

namespace codellama_rt {

// Runs body(context, task) for every task in [0, num_tasks), on up to num_threads() threads. If one
// throws, the rest is left out and the exception is thrown to the caller. A thread that cannot be
// started is a std::runtime_error; calls with a smaller num_threads work after it.
void parallel_for(int64_t num_tasks, void (*body)(void* context, int64_t task), void* context);

#pragma GCC visibility push(default)
int num_threads();            // throws std::invalid_argument for a bad CODELLAMA_RT_NUM_THREADS
void set_num_threads(int n);  // n >= 1

// For the length of its life the operators that this thread calls use at most so many of the
// num_threads(), itself included; other threads' calls are not touched.
class ThreadLimit {
 public:
  explicit ThreadLimit(int most);  // at least 1
  ~ThreadLimit();
  ThreadLimit(const ThreadLimit&) = delete;

 private:
  int found_;
};
#pragma GCC visibility pop

// Scratch memory of the calling thread, 64-byte aligned, kept for its next call: a kernel asks once
// for all it needs. Slots keep a caller's scratch apart from what its tasks ask on the same thread.
enum class Scratch { kCaller, kTask, kPlan };
void* scratch(Scratch slot, size_t bytes);

// Memory for the length of its life, aligned and kept likewise, but for any thread's next call: of
// as many as were lent at a time, however many threads call. For what is too large for each thread.
class LentMemory {
 public:
  explicit LentMemory(size_t bytes);
  ~LentMemory();
  LentMemory(const LentMemory&) = delete;
  void* data() const;

 private:
  struct Arena* arena_;
};

}  // namespace codellama_rt
