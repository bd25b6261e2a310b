// GlobalTensor and LocalTensor: views whose every use goes through the emulator's checks.
#pragma once

#include <cstddef>

#include "element_types.h"
#include "global_memory.h"

namespace AscendC {

template <typename T>
class GlobalTensor {
 public:
  void SetGlobalBuffer(T* begin, uint64_t size = UINT64_MAX) {
    begin_ = begin;
    size_ = size;
  }
  GlobalTensor operator[](uint64_t offset) const {
    if (offset > size_) ascend_emu::fail("GlobalTensor: offset past its buffer");
    GlobalTensor t;
    t.SetGlobalBuffer(begin_ + offset, size_ == UINT64_MAX ? size_ : size_ - offset);
    return t;
  }
  T GetValue(uint64_t i) const {
    ascend_emu::core().issue(PIPE_S, "GlobalTensor::GetValue");
    ascend_emu::global_memory().read(element(i, 1), sizeof(T));
    return begin_[i];
  }
  void SetValue(uint64_t i, T value) const {
    ascend_emu::core().issue(PIPE_S, "GlobalTensor::SetValue");
    ascend_emu::global_memory().write(element(i, 1), sizeof(T));
    begin_[i] = value;
  }

  // Emulator only: `count` elements from element i on.
  T* element(uint64_t i, uint64_t count) const {
    if (size_ != UINT64_MAX && i + count > size_) {
      ascend_emu::fail(std::string(ascend_emu::core().instruction()) +
                       " goes past the buffer of a GlobalTensor");
    }
    return begin_ + i;
  }

 private:
  T* begin_ = nullptr;
  uint64_t size_ = 0;
};

template <typename T>
class LocalTensor {
 public:
  LocalTensor() = default;
  LocalTensor(int64_t begin, int64_t bytes, int64_t buffer)
      : begin_(begin), bytes_(bytes), buffer_(buffer) {}

  LocalTensor operator[](uint32_t offset) const {
    const int64_t skipped = int64_t(offset) * int64_t(sizeof(T));
    if (skipped > bytes_) ascend_emu::fail("LocalTensor: offset past its buffer");
    return {begin_ + skipped, bytes_ - skipped, buffer_};
  }
  T GetValue(uint32_t i) const {
    ascend_emu::core().issue(PIPE_S, "LocalTensor::GetValue");
    return *read(i, 1);
  }
  void SetValue(uint32_t i, T value) const {
    ascend_emu::core().issue(PIPE_S, "LocalTensor::SetValue");
    *write(i, 1) = value;
  }
  uint32_t GetSize() const { return uint32_t(bytes_ / int64_t(sizeof(T))); }

  // Emulator only: checked access by the running instruction.
  const T* read(int64_t i, int64_t count) const {
    ascend_emu::core().read(offset(i, count), count * int64_t(sizeof(T)));
    return reinterpret_cast<const T*>(ascend_emu::core().ub(offset(i, count)));
  }
  T* write(int64_t i, int64_t count) const {
    ascend_emu::core().write(offset(i, count), count * int64_t(sizeof(T)));
    return reinterpret_cast<T*>(ascend_emu::core().ub(offset(i, count)));
  }
  void require_aligned() const {
    if (begin_ % ascend_emu::kBlock) {
      ascend_emu::fail(std::string(ascend_emu::core().instruction()) +
                       ": the address in the unified buffer is not 32-byte aligned");
    }
  }
  int64_t begin() const { return begin_; }
  int64_t buffer() const { return buffer_; }

 private:
  int64_t offset(int64_t i, int64_t count) const {
    const int64_t end = (i + count) * int64_t(sizeof(T));
    if (i < 0 || end > bytes_) {
      ascend_emu::fail(std::string(ascend_emu::core().instruction()) +
                       " goes past its buffer in the unified buffer");
    }
    return begin_ + i * int64_t(sizeof(T));
  }

  int64_t begin_ = 0, bytes_ = 0;
  int64_t buffer_ = -1;  // number of the queue's or TBuf's buffer
};

}  // namespace AscendC
