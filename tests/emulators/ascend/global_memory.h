// Global memory as the emulated cores see it: the tensors of the launch, and who touched them when.
//
// Every access must lie in a tensor that was given to the launch. For those that may be written,
// two bytes at a time are followed: two cores may not touch the same ones, one of them writing,
// between two SyncAll; within a core the pipes must be ordered as in the unified buffer; and the
// scalar program may not read what the launch has written (its cache would not know).
#pragma once

#include <vector>

#include "core.h"

namespace ascend_emu {

struct Region {
  const uint8_t* begin;
  int64_t bytes;
  bool writable;
};

class GlobalMemory {
 public:
  // Tensors that overlap count as one.
  explicit GlobalMemory(std::vector<Region> regions) {
    std::sort(regions.begin(), regions.end(),
              [](const Region& a, const Region& b) { return a.begin < b.begin; });
    for (const Region& r : regions) {
      if (r.bytes <= 0) continue;
      Region* last = tensors_.empty() ? nullptr : &tensors_.back().region;
      if (last && r.begin < last->begin + last->bytes) {
        last->bytes = std::max(last->bytes, r.begin + r.bytes - last->begin);
        last->writable |= r.writable;
      } else {
        tensors_.push_back({r, {}});
      }
    }
    for (Tensor& t : tensors_) {
      if (t.region.writable) t.history.resize((t.region.bytes + kGranule) / kGranule);
    }
  }

  void next_epoch() { ++epoch_; }

  void read(const void* from, int64_t bytes) {
    Tensor& t = find(from, bytes, "reads");
    for_granules(t, from, bytes, [&](Granule& g) {
      if (core().pipe() == PIPE_S && g.access.writer >= 0) {
        fail(std::string(core().instruction()) +
             ": the scalar program reads global memory that the kernel has written");
      }
      if (g.writer_epoch == epoch_ && g.writer_core != core().index) fail_race();
      if (g.writer_epoch == epoch_) core().check_after_write(g.access, "global memory");
      if (g.reader_epoch == epoch_ && g.reader_core != core().index) {
        g.reader_core = kSeveral;
      } else {
        if (g.reader_epoch != epoch_) g.access.read = {};
        g.reader_core = int16_t(core().index);
      }
      g.reader_epoch = epoch_;
      g.access.read[core().pipe()] = core().number();
    });
  }

  void write(const void* to, int64_t bytes) {
    Tensor& t = find(to, bytes, "writes");
    if (!t.region.writable) {
      fail(std::string(core().instruction()) + " writes global memory that is an input");
    }
    for_granules(t, to, bytes, [&](Granule& g) {
      const bool written = g.writer_epoch == epoch_, was_read = g.reader_epoch == epoch_;
      if (written && g.writer_core != core().index) fail_race();
      if (was_read && g.reader_core != core().index) fail_race();
      if (written) core().check_after_write(g.access, "global memory");
      if (was_read) core().check_before_write(g.access, "global memory");
      g.access.writer = int8_t(core().pipe());
      g.access.written = core().number();
      g.writer_core = int16_t(core().index);
      g.writer_epoch = epoch_;
    });
  }

 private:
  static constexpr int64_t kGranule = 2;
  static constexpr int16_t kSeveral = -1;

  struct Granule {
    Access access;
    uint16_t writer_epoch = 0, reader_epoch = 0;  // 0: never
    int16_t writer_core = 0, reader_core = 0;
  };
  struct Tensor {
    Region region;
    std::vector<Granule> history;
  };

  [[noreturn]] static void fail_race() {
    fail(std::string(core().instruction()) +
         " touches global memory that another core touches without a SyncAll between them");
  }

  Tensor& find(const void* address, int64_t bytes, const char* does) {
    const auto* at = static_cast<const uint8_t*>(address);
    for (Tensor& t : tensors_) {
      const Region& r = t.region;
      if (at >= r.begin && at + bytes <= r.begin + r.bytes) return t;
    }
    fail(std::string(core().instruction()) + " " + does +
         " global memory outside the tensors of the launch (" + std::to_string(bytes) + " bytes)");
  }

  template <typename F>
  static void for_granules(Tensor& t, const void* address, int64_t bytes, const F& f) {
    if (t.history.empty()) return;
    const int64_t begin = static_cast<const uint8_t*>(address) - t.region.begin;
    for (int64_t g = begin / kGranule; g <= (begin + bytes - 1) / kGranule; ++g) f(t.history[g]);
  }

  std::vector<Tensor> tensors_;
  uint16_t epoch_ = 1;
};

inline GlobalMemory*& current_memory() {
  static thread_local GlobalMemory* memory = nullptr;
  return memory;
}
inline GlobalMemory& global_memory() { return *current_memory(); }

}  // namespace ascend_emu
