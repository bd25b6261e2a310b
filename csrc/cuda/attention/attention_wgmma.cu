// attention, many queries, on Hopper: as attend_unsplit, with warpgroup matrix products
//                  (FlashAttention-3, arXiv:2407.08608)
// Shapes   head_dim 128, query and cache of one 16-bit type; paged or contiguous
// Traffic  keys and values once for every 128 rows (queries x heads of a group)
// Limit    arithmetic: 4 * 128 * head_dim FLOP a key and block for 512 bytes
// Tiling   one warpgroup asks for tiles (kStages of 16 KiB: 3 pairs of keys and values), two take
//          64 rows each; they take turns at q . k, so that one's softmax runs beside the other's
//          products; blocks of late rows come first
// Numerics the sums of tile.cuh in the same order: tiles of 64 keys, splits, nodes. Whether wgmma
//          adds the 16 products of a step as mma does is the hardware's; tests/devices/cuda asks.
#include "cuda/attention/attention.h"
#include "cuda/attention/kernels.cuh"
#include "cuda/runtime/wgmma.cuh"

namespace codellama_rt {
namespace cuda {
namespace {

constexpr int kConsumers = 2, kGroupThreads = 128, kGroupRows = 64, kStages = 6;
constexpr int kBlockRows = kConsumers * kGroupRows, kThreads = (kConsumers + 1) * kGroupThreads;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;  // 128 * 24 + 256 * 240 < 65,536
constexpr int kTurn = 1, kClear = 3;                              // named barriers: a pair each
constexpr int kTileBytes = FloatTile<bf16>::kBytes;
constexpr int kTotalThreads = kConsumers * kGroupThreads;

struct Stages {
  unsigned char* memory;
  uint64_t *full, *empty;

  CLRT_DEVICE explicit Stages(unsigned char* shared)
      : memory(shared),
        full(reinterpret_cast<uint64_t*>(shared + kStages * kTileBytes)),
        empty(full + kStages) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < kStages; ++i) {
        ptx::barrier_init(full + i, 1);
        ptx::barrier_init(empty + i, kConsumers);
      }
      ptx::barrier_init_fence();
    }
    __syncthreads();
  }
  CLRT_DEVICE unsigned char* wait_full(int count) const {
    ptx::barrier_wait(full + count % kStages, count / kStages & 1);
    return memory + count % kStages * kTileBytes;
  }
  CLRT_DEVICE void give_back(int count) const {
    if (threadIdx.x % kGroupThreads == 0) ptx::barrier_arrive(empty + count % kStages);
  }
};
constexpr int kStageBytes = kStages * kTileBytes + 128;  // and 2 * kStages mbarriers

CLRT_DEVICE void produce(const Attention& a, const Segment& s, const Stages& stages) {
  const int column = a.block_tables ? 0 : s.kv_head * kDim;
  int count = 0;
  for (int key = 0; key < s.end_key; key += kTile) {
    const int left = s.end_key - key, here = left < kTile ? left : kTile;
    for (int is_value = 0; is_value < 2; ++is_value, ++count) {
      const int stage = count % kStages;
      // The first round finds stages empty: the phase before the first is over.
      ptx::barrier_wait(stages.empty + stage, (count / kStages & 1) ^ 1);
      ptx::barrier_expect(stages.full + stage, divide_up(here, a.box_rows) * a.box_rows * 128 * 2);
      for (int i = 0; i < here; i += a.box_rows) {
        const int row = int(key_row(a, s.seq, s.kv_head, key + i));
        for (int part = 0; part < 2; ++part) {
          ptx::tensor_copy(stages.memory + stage * kTileBytes + part * kTileBytes / 2 + i * 128,
                           is_value ? &a.value_map : &a.key_map, column + part * 64, row,
                           stages.full + stage);
        }
      }
    }
  }
}

template <typename T>
CLRT_DEVICE void scores(const unsigned char* keys, uint32_t (&q)[kDim / 16][4],
                        float (&s)[kGroups][4]) {
  ptx::hold(q);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    const unsigned char* at = keys + step / 4 * (kTileBytes / 2) + step % 4 * 32;
    ptx::wgmma_64<T>(s, q[step], ptx::descriptor(at, 16, 1024), step > 0);
  }
  ptx::wgmma_finish();
  ptx::hold(s);
  ptx::hold(q);
}
template <typename T>
CLRT_DEVICE void add_values(const unsigned char* values, const float (&s)[kGroups][4],
                            float (&o)[kDim / 8][4]) {
  uint32_t p[kTile / 16][4];
#pragma unroll
  for (int step = 0; step < kTile / 16; ++step) pack_weights<T>(s, step, p[step]);
  ptx::hold(p);
  ptx::hold(o);
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kTile / 16; ++step) {
    ptx::wgmma_128<T>(o, p[step], ptx::descriptor(values + step * 2048, kTileBytes / 2, 1024),
                      true);
  }
  ptx::wgmma_finish();
  ptx::hold(o);
  ptx::hold(p);
}

template <typename T>
CLRT_DEVICE void consume(const Attention& a, const Segment& s, const Stages& stages,
                         const SharedTotal<kTotalThreads>& total) {
  using Values = FloatTile<T>;
  const int group = threadIdx.x / kGroupThreads, first_row = s.first_row + group * kGroupRows;
  const int warp_row = first_row + threadIdx.x % kGroupThreads / kWarp * kRows;
  WarpRows<T, Values> rows;
  rows.load(a, s, warp_row);
  const int last_row =
      (first_row + kGroupRows < s.end_row ? first_row + kGroupRows : s.end_row) - 1;
  const int most = last_row < first_row ? 0 : visible_keys(a, s.seq, last_row);
  const auto one_node = [&] { return s.end_key <= kSplit * kNode; };
  if (!one_node()) total.clear();
  RowState state, node;
  state.clear();
  node.clear();
  if (group == 1) ptx::named_arrive(kTurn, kTotalThreads);  // the first turn is group 0's
  int count = 0;
  for (int key = 0; key < s.end_key;) {
    const bool sees = most > key, last = key + kTile >= s.end_key;
    float weights[kGroups][4];
    unsigned char* tile = stages.wait_full(count);
    ptx::named_wait(kTurn + group, kTotalThreads);
    if (sees) scores<T>(tile, rows.q, weights);
    if (!last || group == 0) ptx::named_arrive(kTurn + 1 - group, kTotalThreads);
    stages.give_back(count++);
    const int visible[2] = {rows.visible[0] - key, rows.visible[1] - key};
    if (sees) softmax(weights, visible, a.scale_log2, state);
    tile = stages.wait_full(count);
    if (s.end_key - key < kTile) {
      Values::clear_from(tile, s.end_key - key, threadIdx.x % kGroupThreads, kGroupThreads);
      ptx::fence_async();
      ptx::named_wait(kClear + group, kGroupThreads);
    }
    if (sees) add_values<T>(tile, weights, state.o);
    stages.give_back(count++);
    key += kTile;
    if (key % kSplit != 0 && !last) continue;
    state.complete();
    fold(node, state);
    state.clear();
    if (one_node() || (key % (kSplit * kNode) != 0 && !last)) continue;
    total.add(node);
    node.clear();
  }
  if (!one_node()) total.read(node);
  store_rows<T, Values>(a, s, warp_row, node);
}

template <typename T>
CLRT_DEVICE void attend(const Attention& a) {
  Segment found;
  if (!find_block(a, blockIdx.x, kBlockRows, &found)) return;
  found.kv_head = blockIdx.y;
  unsigned char* memory = shared_memory();
  const SharedTotal<kTotalThreads> total{reinterpret_cast<float*>(memory + kStageBytes)};
  Segment& s = *reinterpret_cast<Segment*>(total.memory + total.kFloats * kTotalThreads);
  if (threadIdx.x == 0) s = found;
  const Stages stages(memory);
  if (threadIdx.x < kTotalThreads) {
    ptx::take_registers<kConsumerRegisters>();
    consume<T>(a, s, stages, total);
  } else {
    ptx::give_registers<kProducerRegisters>();
    if (threadIdx.x == kTotalThreads) produce(a, s, stages);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    attend_wgmma_kernel(const __grid_constant__ Attention a) {
  if constexpr (ptx::kHasWgmma) {
    attend<T>(a);
  } else {
    ptx::trap();
  }
}

}  // namespace

bool attend_wgmma(const Attention& a, const AttentionShape& shape) {
  if (!device().bulk || shape.head_dim != kDim) return false;
  if (a.all_split) return true;
  constexpr size_t kBytes = kStageBytes +
                            SharedTotal<kTotalThreads>::kFloats * kTotalThreads * sizeof(float) +
                            sizeof(Segment);
  const auto kernel =
      shape.dtype == DType::kBFloat16 ? attend_wgmma_kernel<bf16> : attend_wgmma_kernel<f16>;
  launch("attention", kernel, unsplit_grid(a, kBlockRows), kThreads, kBytes, a);
  return true;
}

}  // namespace cuda
}  // namespace codellama_rt
