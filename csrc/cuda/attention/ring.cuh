// Tiles of keys and values on their way through shared memory: a ring of stages that one team of
// warps fills and empties itself. While a stage is read, kStages - 1 others are in flight: 32 KiB a
// warp, 128 KiB an SM in decoding, which covers 4.8 TB/s times some 0.8 us of latency.
//
// kBulk: Hopper's copy engine, one thread asks; else cp.async, every thread copies its share. A
// team of one warp needs no barrier of the block; a larger team is the whole block.
#pragma once

#include "cuda/attention/tile.cuh"

namespace codellama_rt {
namespace cuda {

template <typename Tile, bool kBulk, int kTeam>
class Ring {
 public:
  static constexpr int kBarrierBytes = 64;  // of Tile::kStages mbarriers, behind the stages
  static constexpr int kRequestBytes = 96, kUnitBytes = 32;
  static constexpr int kBytes =
      (Tile::kStages * Tile::kBytes + kBarrierBytes + kRequestBytes + kUnitBytes + 1023) / 1024 *
      1024;
  static_assert(Tile::kStages * 8 <= kBarrierBytes, "an mbarrier has 8 bytes");

  CLRT_DEVICE explicit Ring(unsigned char* memory)
      : stages_(memory),
        barriers_(reinterpret_cast<uint64_t*>(memory + Tile::kStages * Tile::kBytes)),
        thread_(threadIdx.x % (kTeam * kWarp)) {
    if constexpr (kBulk) {
      if (thread_ == 0) {
        for (int i = 0; i < Tile::kStages; ++i) ptx::barrier_init(barriers_ + i, 1);
        ptx::barrier_init_fence();
      }
      sync();
    }
  }

  // Whether this thread speaks for the team; and room for what is to be asked for next, and for
  // what is computed: registers are short.
  CLRT_DEVICE bool leads() const { return thread_ == 0; }
  CLRT_DEVICE void* request_memory() const { return barriers_ + kBarrierBytes / 8; }
  CLRT_DEVICE void* unit_memory() const { return barriers_ + (kBarrierBytes + kRequestBytes) / 8; }

  // Asks for the tile of keys (or values) from `key` on, for the next free stage.
  CLRT_DEVICE void request(const Attention& a, const Segment& s, int key, bool is_value) {
    const int left = s.end_key - key, count = left < kTile ? left : kTile;
    unsigned char* stage = stages_ + requested_ % Tile::kStages * Tile::kBytes;
    if constexpr (kBulk) {
      request_bulk(a, s, key, count, is_value, stage);
    } else {
      request_pieces(a, s, key, count, is_value, stage);
      ptx::commit_copies();
    }
    ++requested_;
  }
  // In place of a request, where nothing is left to ask for.
  CLRT_DEVICE void request_nothing() {
    if constexpr (!kBulk) ptx::commit_copies();
    ++requested_;
  }

  // The oldest stage, once it is there; all of the team see it.
  CLRT_DEVICE unsigned char* take() {
    const int stage = taken_ % Tile::kStages;
    if constexpr (kBulk) {
      ptx::barrier_wait(barriers_ + stage, taken_ / Tile::kStages & 1);
    } else {
      ptx::wait_copies<Tile::kStages - 1>();
      sync();
    }
    return stages_ + stage * Tile::kBytes;
  }
  // The stage's values from key number `first` of the tile on become zeros.
  CLRT_DEVICE void clear_from(unsigned char* stage, int first) {
    Tile::clear_from(stage, first, thread_, kTeam * kWarp);
    if constexpr (kBulk) ptx::fence_async();  // the engine writes there next
    sync();
  }
  // The team is done with the stage it took.
  CLRT_DEVICE void give_back() {
    sync();
    ++taken_;
  }
  CLRT_DEVICE static void sync() {
    if constexpr (kTeam == 1) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

 private:
  CLRT_DEVICE void request_bulk(const Attention& a, const Segment& s, int key, int count,
                                bool is_value, unsigned char* stage) {
    uint64_t* barrier = barriers_ + requested_ % Tile::kStages;
    if constexpr (Tile::kQuantized) {
      const int step = a.block_size % kTile == 0 ? kTile : kCacheGroup;  // keys that lie together
      const int groups = divide_up(count, kCacheGroup);
      ptx::barrier_expect(barrier, groups * Tile::kGroupBytes);
      for (int i = 0; i < count; i += step) {
        const int64_t row = key_row(a, s.seq, s.kv_head, key + i);
        const int bytes = (step == kTile ? groups : 1) * Tile::kGroupBytes;
        ptx::bulk_copy(stage + i / kCacheGroup * Tile::kGroupBytes,
                       values_or_keys(a, is_value) + quantized_row_offset(row, kDim), bytes,
                       barrier);
      }
    } else {
      constexpr int kParts = kDim / 64;
      const ptx::TensorMap* map = is_value ? &a.value_map : &a.key_map;
      const int column = a.block_tables ? 0 : s.kv_head * kDim;
      ptx::barrier_expect(barrier, divide_up(count, a.box_rows) * a.box_rows * 128 * kParts);
      for (int i = 0; i < count; i += a.box_rows) {
        const int row = int(key_row(a, s.seq, s.kv_head, key + i));
        for (int part = 0; part < kParts; ++part) {
          ptx::tensor_copy(stage + part * kTile * 128 + i * 128, map, column + part * 64, row,
                           barrier);
        }
      }
    }
  }

  CLRT_DEVICE void request_pieces(const Attention& a, const Segment& s, int key, int count,
                                  bool is_value, unsigned char* stage) {
    const unsigned char* memory = values_or_keys(a, is_value);
    if constexpr (Tile::kQuantized) {
      constexpr int kPieces = Tile::kGroupBytes / 16;
#pragma unroll 1  // its registers are wanted elsewhere
      for (int i = thread_; i < divide_up(count, kCacheGroup) * kPieces; i += kTeam * kWarp) {
        const int group = i / kPieces;
        const int64_t row = key_row(a, s.seq, s.kv_head, key + group * kCacheGroup);
        ptx::copy16_async(stage + i * 16,
                          memory + quantized_row_offset(row, kDim) + i % kPieces * 16);
      }
    } else {
      constexpr int kPieces = kDim / 8;
      const int64_t row_bytes = (a.block_tables ? 1 : a.n_kv_heads) * kDim * 2;
      const int64_t column = a.block_tables ? 0 : s.kv_head * kDim * 2;
#pragma unroll 1
      for (int i = thread_; i < count * kPieces; i += kTeam * kWarp) {
        const int64_t row = key_row(a, s.seq, s.kv_head, key + i / kPieces);
        ptx::copy16_async(stage + Tile::offset(i / kPieces, i % kPieces),
                          memory + row * row_bytes + column + i % kPieces * 16);
      }
    }
  }

  CLRT_DEVICE static const unsigned char* values_or_keys(const Attention& a, bool is_value) {
    return static_cast<const unsigned char*>(is_value ? a.value : a.key);
  }

  unsigned char* stages_;
  uint64_t* barriers_;
  int thread_, requested_ = 0, taken_ = 0;
};

// Asks for tile after tile of the segments that Source gives, keys before values.
template <typename Ring, typename Source>
class Requests {
 public:
  Requests() = default;
  CLRT_DEVICE Requests(const Attention& a, const Source& source) : source_(source) {
    more_ = source_.next(a, &segment_);
    key_ = segment_.first_key;
    skip_empty(a);
  }

  CLRT_DEVICE void next(const Attention& a, Ring& ring) {
    if (!more_) return ring.request_nothing();
    ring.request(a, segment_, key_, is_value_);
    is_value_ = !is_value_;
    if (is_value_) return;
    key_ += kTile;
    skip_empty(a);
  }

 private:
  CLRT_DEVICE void skip_empty(const Attention& a) {
    while (more_ && key_ >= segment_.end_key) {
      more_ = source_.next(a, &segment_);
      key_ = segment_.first_key;
    }
  }

  Source source_;
  Segment segment_;
  int key_;
  bool is_value_ = false, more_;
};

// The requests of a ring and the first of them: in shared memory, for registers are short. One
// thread asks the copy engine; cp.async is every thread's, from a copy that lives as long as a
// call.
template <typename Ring, typename Source, bool kBulk>
class Feed {
 public:
  CLRT_DEVICE Feed(const Attention& a, Ring& ring, const Source& source, int stages) : ring_(ring) {
    static_assert(sizeof(Requests<Ring, Source>) <= Ring::kRequestBytes, "no room for requests");
    if (ring.leads()) requests() = Requests<Ring, Source>(a, source);
    Ring::sync();
    for (int i = 0; i < stages; ++i) next(a);
  }
  CLRT_DEVICE void next(const Attention& a) {
    if constexpr (kBulk) {
      if (ring_.leads()) requests().next(a, ring_);
    } else {
      Requests<Ring, Source> mine = requests();
      Ring::sync();
      mine.next(a, ring_);
      if (ring_.leads()) requests() = mine;
      Ring::sync();
    }
  }

 private:
  CLRT_DEVICE Requests<Ring, Source>& requests() {
    return *static_cast<Requests<Ring, Source>*>(ring_.request_memory());
  }

  Ring& ring_;
};

}  // namespace cuda
}  // namespace codellama_rt
