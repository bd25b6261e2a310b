// The instructions of ptx.cuh on the CPU, as the PTX ISA describes them.
#pragma once

#include <algorithm>
#include <vector>

#include "emu.h"

namespace codellama_rt {
namespace cuda {
namespace ptx {

constexpr bool kHasWgmma = true;
template <bool kBulk>
constexpr bool kBuilds = true;
inline void trap() { std::abort(); }

// A row-major matrix of 16-bit elements and the box that is copied of it, swizzled by 128 bytes.
struct TensorMap {
  const unsigned char* memory;
  int64_t columns, rows, row_bytes;
  int box_columns, box_rows;
};

inline float exp2(float x) { return std::exp2(x); }

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= uint32_t(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
  }
  return result;
}

inline uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  const auto half = [](uint32_t x, int i) { return to_float(bf16{uint16_t(x >> 16 * i)}); };
  return pack<bf16>(std::fma(half(a, 0), half(b, 0), half(c, 0)),
                    std::fma(half(a, 1), half(b, 1), half(c, 1)));
}

struct Fragments {
  float a[8], b[4];
};

template <typename T>
void unpack(uint32_t packed, float* out) {
  out[0] = to_float(T{uint16_t(packed)});
  out[1] = to_float(T{uint16_t(packed >> 16)});
}

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Fragments mine;
  for (int i = 0; i < 4; ++i) unpack<T>(a[i], mine.a + 2 * i);
  unpack<T>(b0, mine.b);
  unpack<T>(b1, mine.b + 2);
  const auto* slots = emu::exchange(emu::warp(), emu::lane(), emu::kWarp, mine);
  const int g = emu::lane() / 4, t = emu::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int place = k % 8 / 2, half = k % 2, upper = k / 8;
      const float x = emu::slot<Fragments>(slots, 4 * g + place).a[4 * upper + i / 2 * 2 + half];
      const float y = emu::slot<Fragments>(slots, 4 * (2 * t + i % 2) + place).b[2 * upper + half];
      sum += double(x) * y;
    }
    c[i] = float(sum);
  }
}

inline const uint16_t* row_of(const unsigned char (*slots)[emu::kSlotBytes], int matrix, int row) {
  return static_cast<const uint16_t*>(emu::slot<const void*>(slots, 8 * matrix + row));
}
inline void load_matrices(uint32_t (&r)[4], const void* row) {
  const auto* slots = emu::exchange(emu::warp(), emu::lane(), emu::kWarp, row);
  const int g = emu::lane() / 4, t = emu::lane() % 4;
  for (int m = 0; m < 4; ++m) std::memcpy(&r[m], row_of(slots, m, g) + 2 * t, 4);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  const auto* slots = emu::exchange(emu::warp(), emu::lane(), emu::kWarp, row);
  const int g = emu::lane() / 4, t = emu::lane() % 4;
  for (int m = 0; m < 4; ++m) {
    r[m] = row_of(slots, m, 2 * t)[g] | uint32_t(row_of(slots, m, 2 * t + 1)[g]) << 16;
  }
}

// A copy that has not arrived: its destination holds NaN until somebody waits for it.
struct Copy {
  unsigned char* to;
  std::vector<unsigned char> bytes;
};
inline Copy begin_copy(void* to, const void* from, size_t bytes) {
  auto* begin = static_cast<const unsigned char*>(from);
  Copy copy{static_cast<unsigned char*>(to), {begin, begin + bytes}};
  std::memset(to, 0xff, bytes);
  return copy;
}
inline void finish(const Copy& copy) {
  std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
  emu::made_progress();
}

// Groups of 16-byte copies, a list a thread.
inline std::vector<std::vector<Copy>>& copy_groups() {
  static thread_local std::vector<std::vector<Copy>> groups[emu::kMaxThreads];
  auto& mine = groups[emu::thread().number];
  if (mine.empty()) mine.emplace_back();
  return mine;
}
inline void copy16_async(void* to, const void* from) {
  copy_groups().back().push_back(begin_copy(to, from, 16));
}
inline void commit_copies() { copy_groups().emplace_back(); }
template <int kPending>
void wait_copies() {
  auto& groups = copy_groups();
  while (int(groups.size()) > kPending + 1) {
    for (const Copy& copy : groups.front()) finish(copy);
    groups.erase(groups.begin());
  }
}

// An mbarrier in its 8 bytes. Copies that report to it wait beside it.
struct Barrier {
  int32_t bytes;
  int8_t count, pending, phase, initialised;
};
static_assert(sizeof(Barrier) == 8, "an mbarrier has 8 bytes");
struct Arrival {
  uint64_t* barrier;
  Copy copy;
};
inline std::vector<Arrival>& arrivals() {
  static thread_local std::vector<Arrival> all;
  return all;
}
inline Barrier& barrier_of(uint64_t* barrier) { return *reinterpret_cast<Barrier*>(barrier); }
inline void settle(Barrier& b) {
  if (b.pending != 0 || b.bytes != 0) return;
  b.phase ^= 1;
  b.pending = b.count;
  emu::made_progress();
}
inline void barrier_init(uint64_t* barrier, int count) {
  barrier_of(barrier) = {0, int8_t(count), int8_t(count), 0, 1};
}
inline void barrier_init_fence() {}
inline void fence_async() {}
inline void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  Barrier& b = barrier_of(barrier);
  b.bytes += int32_t(bytes);
  --b.pending;
  settle(b);
}
inline void barrier_arrive(uint64_t* barrier) {
  Barrier& b = barrier_of(barrier);
  --b.pending;
  settle(b);
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while (barrier_of(barrier).phase == int8_t(parity)) {
    auto& all = arrivals();
    for (size_t i = 0; i < all.size();) {
      if (all[i].barrier != barrier) {
        ++i;
        continue;
      }
      const Arrival arrival = std::move(all[i]);
      all.erase(all.begin() + i);
      finish(arrival.copy);
      barrier_of(barrier).bytes -= int32_t(arrival.copy.bytes.size());
      settle(barrier_of(barrier));
    }
    if (barrier_of(barrier).phase == int8_t(parity)) emu::yield();
  }
}
inline void bulk_copy(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  if (bytes % 16 || uintptr_t(to) % 16 || uintptr_t(from) % 16) std::abort();
  arrivals().push_back({barrier, begin_copy(to, from, bytes)});
}
inline void tensor_copy(void* to, const TensorMap* map, int x, int y, uint64_t* barrier) {
  if (uintptr_t(to) % 1024) std::abort();  // the swizzle goes by address
  std::vector<unsigned char> box(size_t(map->box_rows) * 128, 0);
  for (int row = 0; row < map->box_rows; ++row) {
    for (int chunk = 0; chunk < map->box_columns / 8; ++chunk) {
      if (y + row < 0 || y + row >= map->rows || x + 8 * chunk >= map->columns) continue;
      std::memcpy(&box[row * 128 + (chunk ^ row % 8) * 16],
                  map->memory + (y + row) * map->row_bytes + (x + 8 * chunk) * 2, 16);
    }
  }
  arrivals().push_back({barrier, begin_copy(to, box.data(), box.size())});
}

}  // namespace ptx
}  // namespace cuda
}  // namespace codellama_rt
