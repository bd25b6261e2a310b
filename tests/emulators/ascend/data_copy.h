// Copies between global memory and the unified buffer.
#pragma once

#include "tensors.h"

namespace AscendC {

// Lengths and strides (gaps) in global memory in bytes; strides in the unified buffer in 32 bytes.
struct DataCopyExtParams {
  DataCopyExtParams() = default;
  DataCopyExtParams(uint16_t count, uint32_t length, uint32_t source, uint32_t destination,
                    uint32_t reserved)
      : blockCount(count),
        blockLen(length),
        srcStride(source),
        dstStride(destination),
        rsv(reserved) {}
  uint16_t blockCount = 1;
  uint32_t blockLen = 0, srcStride = 0, dstStride = 0, rsv = 0;
};

template <typename T>
struct DataCopyPadExtParams {
  DataCopyPadExtParams() = default;
  DataCopyPadExtParams(bool pads, uint8_t left, uint8_t right, T value)
      : isPad(pads), leftPadding(left), rightPadding(right), paddingValue(value) {}
  bool isPad = false;
  uint8_t leftPadding = 0, rightPadding = 0;
  T paddingValue{};
};

namespace emu_copy {

inline void check(const DataCopyExtParams& p, uint32_t in_global, size_t element) {
  if (p.blockLen < 1 || p.blockLen > 2097151 || p.blockCount < 1 || p.blockCount > 4095) {
    ascend_emu::fail("DataCopyPad: blockLen must be in [1, 2097151] and blockCount in [1, 4095]");
  }
  if (p.blockLen % element || in_global % element) {
    ascend_emu::fail("DataCopyPad: blockLen or the stride in global memory cuts an element");
  }
}

// A block of bytes in the unified buffer takes whole 32 bytes.
inline int64_t padded(uint32_t bytes) { return (int64_t(bytes) + 31) / 32 * 32; }

}  // namespace emu_copy

template <typename T>
void DataCopy(const LocalTensor<T>& to, const GlobalTensor<T>& from, uint32_t count) {
  ascend_emu::core().issue(PIPE_MTE2, "DataCopy");
  to.require_aligned();
  if (count * sizeof(T) % 32 || count == 0) {
    ascend_emu::fail("DataCopy: the length is not a positive multiple of 32 bytes");
  }
  const T* source = from.element(0, count);
  ascend_emu::global_memory().read(source, count * int64_t(sizeof(T)));
  std::memcpy(static_cast<void*>(to.write(0, count)), source, count * sizeof(T));
}

template <typename T>
void DataCopy(const GlobalTensor<T>& to, const LocalTensor<T>& from, uint32_t count) {
  ascend_emu::core().issue(PIPE_MTE3, "DataCopy");
  from.require_aligned();
  if (count * sizeof(T) % 32 || count == 0) {
    ascend_emu::fail("DataCopy: the length is not a positive multiple of 32 bytes");
  }
  T* destination = to.element(0, count);
  ascend_emu::global_memory().write(destination, count * int64_t(sizeof(T)));
  std::memcpy(static_cast<void*>(destination), from.read(0, count), count * sizeof(T));
}

template <typename T>
void DataCopyPad(const LocalTensor<T>& to, const GlobalTensor<T>& from, const DataCopyExtParams& p,
                 const DataCopyPadExtParams<T>& pad) {
  ascend_emu::core().issue(PIPE_MTE2, "DataCopyPad");
  to.require_aligned();
  emu_copy::check(p, p.srcStride, sizeof(T));
  if (pad.isPad && pad.leftPadding) ascend_emu::fail("emulator: leftPadding is not there");
  const int64_t elements = p.blockLen / sizeof(T);
  const int64_t filled = pad.isPad ? pad.rightPadding : 0;
  if ((elements + filled) * int64_t(sizeof(T)) > emu_copy::padded(p.blockLen)) {
    ascend_emu::fail("DataCopyPad: the padding goes past the 32 bytes");
  }
  int64_t source = 0, destination = 0;  // elements
  for (int b = 0; b < p.blockCount; ++b) {
    const T* block = from.element(uint64_t(source), uint64_t(elements));
    ascend_emu::global_memory().read(block, p.blockLen);
    T* out = to.write(destination, elements + filled);
    std::memcpy(static_cast<void*>(out), block, p.blockLen);
    for (int64_t i = 0; i < filled; ++i) out[elements + i] = pad.paddingValue;
    source += elements + int64_t(p.srcStride / sizeof(T));
    destination += (emu_copy::padded(p.blockLen) + 32 * int64_t(p.dstStride)) / int64_t(sizeof(T));
  }
}

template <typename T>
void DataCopyPad(const GlobalTensor<T>& to, const LocalTensor<T>& from,
                 const DataCopyExtParams& p) {
  ascend_emu::core().issue(PIPE_MTE3, "DataCopyPad");
  from.require_aligned();
  emu_copy::check(p, p.dstStride, sizeof(T));
  const int64_t elements = p.blockLen / sizeof(T);
  int64_t source = 0, destination = 0;  // elements
  for (int b = 0; b < p.blockCount; ++b) {
    T* block = to.element(uint64_t(destination), uint64_t(elements));
    ascend_emu::global_memory().write(block, p.blockLen);
    std::memcpy(static_cast<void*>(block), from.read(source, elements), p.blockLen);
    source += (emu_copy::padded(p.blockLen) + 32 * int64_t(p.srcStride)) / int64_t(sizeof(T));
    destination += elements + int64_t(p.dstStride / sizeof(T));
  }
}

}  // namespace AscendC
