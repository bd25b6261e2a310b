// The state of one emulated vector core: its pipes' clocks, its unified buffer, what it knows.
//
// A kernel's scalar program runs here from top to bottom. On the device its instructions go to
// pipes that run at the same time: MTE2 (global memory to UB), V (vectors), MTE3 (UB to global
// memory), S (the scalar program's own loads and stores). Two instructions that touch the same 32
// bytes, one of them writing, must be ordered by an event, a queue's hand-over or a barrier. The
// emulator keeps, for each pipe, a vector clock of what is known to be complete when its next
// instruction begins, and for each 32 bytes of the UB who wrote and read them last.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

enum pipe_t { PIPE_S, PIPE_V, PIPE_MTE2, PIPE_MTE3, PIPE_ALL };

namespace ascend_emu {

constexpr int kPipes = 4;
constexpr int64_t kUbBytes = 192 * 1024;
constexpr int64_t kBlock = 32;
constexpr int kEvents = 8;  // numbers of events between two pipes
constexpr int kMostBuffers = 64;
constexpr int kPositions = 4;

struct Violation : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] inline void fail(const std::string& message) { throw Violation(message); }

inline const char* pipe_name(int pipe) {
  static const char* const names[] = {"S", "V", "MTE2", "MTE3"};
  return names[pipe];
}

using Clock = std::array<uint32_t, kPipes>;  // instructions of each pipe known to be complete

inline void join(Clock* clock, const Clock& other) {
  for (int p = 0; p < kPipes; ++p) (*clock)[p] = std::max((*clock)[p], other[p]);
}

// Who touched a piece of memory last.
struct Access {
  int8_t writer = -1;  // pipe
  uint32_t written = 0;
  Clock read{};
};

class Core {
 public:
  int64_t index = 0, num_cores = 1;
  bool has_sync = false;     // what the kernel declares: SyncAll may be called,
  int64_t tiling_bytes = 0;  // and how large its tiling struct is

  // Before a kernel: empty buffers, clocks at zero.
  void reset(int64_t core, int64_t cores) {
    index = core;
    num_cores = cores;
    issued_ = {};
    for (Clock& clock : known_) clock = {};
    const int64_t touched = std::min(used_, kUbBytes);
    std::memset(initialised_.data(), 0, touched);
    std::fill(blocks_.begin(), blocks_.begin() + touched / kBlock, Access{});
    used_ = 0;
    flags_.clear();
    queues_open_ = 0;
    num_buffers_ = 0;
    queue_buffers_ = {};
    has_sync = false;
    tiling_bytes = 0;
  }

  // ---- the unified buffer ----------------------------------------------------------------

  int64_t reserve(int64_t bytes) {
    const int64_t begin = used_;
    if (++num_buffers_ > kMostBuffers) fail("InitBuffer: more than 64 buffers in a kernel");
    used_ += (bytes + kBlock - 1) / kBlock * kBlock;
    if (used_ > kUbBytes) {
      fail("unified buffer overflow: " + std::to_string(used_) + " of " + std::to_string(kUbBytes) +
           " bytes");
    }
    return begin;
  }
  // A buffer of a queue; `position` is where what it holds comes from. Its events have numbers.
  int64_t reserve_queued(int position, int64_t bytes) {
    if (++queue_buffers_[position] > kEvents) {
      fail("InitBuffer: more than 8 buffers of queues at one position, events run out");
    }
    return reserve(bytes);
  }
  uint8_t* ub(int64_t offset) { return memory_.data() + offset; }
  void forget(int64_t begin, int64_t bytes) { std::memset(initialised_.data() + begin, 0, bytes); }

  // ---- instructions ----------------------------------------------------------------------

  void issue(int pipe, const char* name) {
    // The scalar program issues in order: what it has waited for is complete for whatever follows.
    join(&known_[pipe], known_[PIPE_S]);
    ++issued_[pipe];
    pipe_ = pipe;
    name_ = name;
  }
  const char* instruction() const { return name_; }

  void read(int64_t begin, int64_t bytes) {
    if (bytes <= 0) return;
    if (std::memchr(initialised_.data() + begin, 0, bytes)) {
      fail(std::string(name_) + " reads uninitialised unified buffer");
    }
    for (int64_t b = begin / kBlock; b <= (begin + bytes - 1) / kBlock; ++b) {
      check_after_write(blocks_[b], "unified buffer");
      blocks_[b].read[pipe_] = issued_[pipe_];
    }
  }
  void write(int64_t begin, int64_t bytes) {
    if (bytes <= 0) return;
    std::memset(initialised_.data() + begin, 1, bytes);
    for (int64_t b = begin / kBlock; b <= (begin + bytes - 1) / kBlock; ++b) {
      check_before_write(blocks_[b], "unified buffer");
      blocks_[b].writer = int8_t(pipe_);
      blocks_[b].written = issued_[pipe_];
    }
  }

  // What was written here must be complete. No hazards: the running instruction with itself, and
  // the scalar program's own accesses, which are done in order.
  void check_after_write(const Access& last, const char* where) const {
    if (last.writer >= 0 && !complete(last.writer, last.written)) {
      fail_order(last.writer, "wrote", where);
    }
  }
  void check_before_write(const Access& last, const char* where) const {
    check_after_write(last, where);
    for (int p = 0; p < kPipes; ++p) {
      if (!complete(p, last.read[p])) fail_order(p, "reads", where);
    }
  }
  int pipe() const { return pipe_; }
  uint32_t number() const { return issued_[pipe_]; }

  // ---- synchronisation -------------------------------------------------------------------

  // What is complete once `pipe` has done all it was given.
  Clock snapshot(int pipe) const {
    Clock clock = known_[pipe];
    clock[pipe] = issued_[pipe];
    return clock;
  }
  void learn(int pipe, const Clock& clock) { join(&known_[pipe], clock); }

  void barrier(int pipe) {
    if (pipe != PIPE_ALL) {
      known_[pipe][pipe] = issued_[pipe];
      return;
    }
    for (Clock& clock : known_) clock = issued_;
  }

  void set_flag(int from, int to, int id) {
    check_event(id);
    if (!flags_.emplace(std::array<int, 3>{from, to, id}, snapshot(from)).second) {
      fail("SetFlag of an event that is set already: " + event_name(from, to, id));
    }
  }
  void wait_flag(int from, int to, int id) {
    check_event(id);
    const auto found = flags_.find({from, to, id});
    if (found == flags_.end()) {
      fail("WaitFlag of an event that nobody sets, the device would hang: " +
           event_name(from, to, id));
    }
    learn(to, found->second);
    flags_.erase(found);
  }

  void tensor_taken() { ++queues_open_; }
  void tensor_freed() { --queues_open_; }

  // At the end of the kernel.
  void finish() const {
    if (!flags_.empty()) {
      const auto& key = flags_.begin()->first;
      fail("an event is left set: " + event_name(key[0], key[1], key[2]));
    }
    if (queues_open_ > 0) fail("the kernel ends with a tensor of a queue that was not freed");
  }

 private:
  bool complete(int pipe, uint32_t number) const {
    const bool own = pipe == pipe_ && (number == issued_[pipe] || pipe == PIPE_S);
    return own || number <= known_[pipe_][pipe];
  }
  [[noreturn]] void fail_order(int other, const char* did, const char* where) const {
    fail(std::string("missing synchronisation: ") + name_ + " on pipe " + pipe_name(pipe_) +
         " touches " + where + " that pipe " + pipe_name(other) + " " + did +
         (other == pipe_ ? " (PipeBarrier)" : " (queue or event)"));
  }
  static std::string event_name(int from, int to, int id) {
    return std::string(pipe_name(from)) + "_" + pipe_name(to) + " " + std::to_string(id);
  }
  static void check_event(int id) {
    if (id < 0 || id >= kEvents) fail("event id " + std::to_string(id) + " is not in [0, 8)");
  }

  std::vector<uint8_t> memory_ = std::vector<uint8_t>(kUbBytes);
  std::vector<uint8_t> initialised_ = std::vector<uint8_t>(kUbBytes);
  std::vector<Access> blocks_ = std::vector<Access>(kUbBytes / kBlock);
  std::map<std::array<int, 3>, Clock> flags_;
  std::array<Clock, kPipes> known_{};
  Clock issued_{};
  int64_t used_ = 0, queues_open_ = 0;
  int num_buffers_ = 0;
  std::array<int, kPositions> queue_buffers_{};
  int pipe_ = PIPE_S;
  const char* name_ = "";
};

// The core whose program runs: cores take turns in one thread.
inline Core*& current_core() {
  static thread_local Core* core = nullptr;
  return core;
}
inline Core& core() { return *current_core(); }

}  // namespace ascend_emu
