// paged_attention: out[t,h] = softmax(scale * q[t,h] . K) V over pages, causal from the end
//                  (flash decoding: arXiv:2309.06180, arXiv:2307.08691)
// Shapes   query, out (T, H, D), caches (blocks, K, block_size, D), float16 or bfloat16;
//          block_tables (S, max_blocks) int32; seq_lens (S), cu_seqlens_q (S + 1) int64;
//          lse (T, H) float32
// Traffic  4 * keys * K * D bytes a token, each key and value once for all heads of its group:
//          16.8 MB a token and layer at 1,024 keys and 32 heads of 128, 1.6 GB at 100,000
// Limit    decoding: memory (1 FLOP/byte without groups, which the vector cores keep up with; 8 at
//          64/8 heads, which is the cube cores' work: attention="vendor")
// Tiling   a unit = (token, key/value head, split of 1,024 keys at absolute positions); contiguous
//          runs of units of equal weight a core; 64 keys and values in the unified buffer, the next
//          64 arriving meanwhile. Rows that cores share are merged from the workspace (head_dim +
//          16 floats a head and split) after one SyncAll
// Numerics float32; each split starts anew and splits are merged in ascending order, so a row's
//          bits depend neither on the batch nor on the number of cores
#include "common.h"

namespace codellama_rt {
namespace ascend {

constexpr float kLowest = -3.0e38f;  // below every score; exp(kLowest - x) is 0
constexpr float kMinusInfinity = -__builtin_huge_valf();

// A row's place and length.
struct AttentionRow {
  int64_t row, token, head, sequence, keys, num_splits;
};

struct AttentionTensors {
  __gm__ uint8_t *query, *key_cache, *value_cache, *block_tables, *seq_lens, *cu_seqlens_q, *out,
      *lse, *partials;
};

template <typename T>
class PagedAttention {
 public:
  __aicore__ inline void init(const AttentionTensors& a, const PagedAttentionTiling* tiling) {
    t_ = tiling;
    group_ = t_->n_heads / t_->n_kv_heads;
    dim_ = t_->head_dim;
    stride_ = uint8_t(dim_ / kBlockFloats);
    heads_size_ = group_ * dim_;
    blocks_size_ = int32_t(group_ * kBlockFloats);
    query_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.query));
    key_cache_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.key_cache));
    value_cache_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.value_cache));
    block_tables_.SetGlobalBuffer(reinterpret_cast<__gm__ int32_t*>(a.block_tables));
    seq_lens_.SetGlobalBuffer(reinterpret_cast<__gm__ int64_t*>(a.seq_lens));
    cu_seqlens_q_.SetGlobalBuffer(reinterpret_cast<__gm__ int64_t*>(a.cu_seqlens_q));
    out_.SetGlobalBuffer(reinterpret_cast<__gm__ T*>(a.out));
    lse_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(a.lse));
    partials_.SetGlobalBuffer(reinterpret_cast<__gm__ float*>(a.partials));
    init_buffers();
  }

  // The units of this core: whole rows are finished here, parts of rows go to the workspace.
  __aicore__ inline void process() {
    const int64_t core = GetBlockIdx();
    const AttentionUnit begin = t_->first[core], end = t_->first[core + 1];
    int64_t split = begin.split, sequence = begin.sequence;
    for (int64_t r = begin.row; r < end.row || (r == end.row && split < end.split); ++r) {
      const AttentionRow row = find_row(r, sequence);
      sequence = row.sequence;
      const int64_t stop = r == end.row ? end.split : row.num_splits;
      load_query(row);
      if (split == 0 && stop == row.num_splits) {
        for (int64_t s = 0; s < stop; ++s) {
          attend(row, s);
          merge(s == 0);
        }
        store_result(row);
      } else {
        const int64_t slot = split > 0 ? t_->inherited_slot[core] : t_->open_slot[core];
        for (int64_t s = split; s < stop; ++s) {
          attend(row, s);
          store_partial(slot + s - split);
        }
      }
      split = 0;
    }
  }

  // After all cores' units: merge the row that this core began and left open.
  __aicore__ inline void combine() {
    const int64_t core = GetBlockIdx(), slot = t_->open_slot[core];
    if (slot < 0) return;
    const AttentionUnit open = t_->first[core + 1];
    const AttentionRow row = find_row(open.row, open.sequence);
    for (int64_t s = 0; s < row.num_splits; ++s) {
      load_partial(slot + s);
      merge(s == 0);
    }
    store_result(row);
  }

 private:
  __aicore__ inline void init_buffers() {
    const uint32_t heads = uint32_t(heads_size_ * sizeof(float));
    const uint32_t blocks = uint32_t(round_up(group_, kBlockFloats) * kDmaBytes);
    const uint32_t slot = uint32_t(t_->slot_floats * sizeof(float));
    const int64_t product = dim_ > kVectorFloats ? dim_ : kVectorFloats;
    pipe_.InitBuffer(pages_, 2, uint32_t(2 * t_->tile * dim_ * sizeof(T)));
    pipe_.InitBuffer(query_in_, 1, uint32_t(heads_size_ * sizeof(T)));
    pipe_.InitBuffer(result_, 1, uint32_t(heads_size_ * sizeof(T)));
    pipe_.InitBuffer(logsum_, 1, uint32_t(group_ * kDmaBytes));
    pipe_.InitBuffer(partial_out_, 1, slot);
    pipe_.InitBuffer(partial_in_, 1, slot);
    pipe_.InitBuffer(rows_, uint32_t(t_->tile * dim_ * sizeof(float)));
    pipe_.InitBuffer(products_, uint32_t(t_->tile * product * sizeof(float)));
    pipe_.InitBuffer(spread_, uint32_t(round_up(t_->tile, kBlockFloats) * kDmaBytes));
    pipe_.InitBuffer(scores_, uint32_t(group_ * kVectorFloats * sizeof(float)));
    pipe_.InitBuffer(numbers_, uint32_t(round_up(group_, kBlockFloats) * sizeof(float)));
    pipe_.InitBuffer(query_floats_, heads);
    pipe_.InitBuffer(acc_, heads);
    pipe_.InitBuffer(total_acc_, heads);
    pipe_.InitBuffer(max_, blocks);
    pipe_.InitBuffer(sum_, blocks);
    pipe_.InitBuffer(total_max_, blocks);
    pipe_.InitBuffer(total_sum_, blocks);
    pipe_.InitBuffer(next_, blocks);
    pipe_.InitBuffer(old_, blocks);
    pipe_.InitBuffer(new_, blocks);
    // Brcb reads whole blocks: what lies past the numbers in use must be something.
    Duplicate(scores_.Get<float>(), 0.0f, int32_t(group_ * kVectorFloats));
    Duplicate(numbers_.Get<float>(), 0.0f, int32_t(round_up(group_, kBlockFloats)));
    vector_barrier();
  }

  __aicore__ inline AttentionRow find_row(int64_t r, int64_t sequence) {
    AttentionRow row = {r, r / t_->n_kv_heads, r % t_->n_kv_heads, sequence, 0, 1};
    while (row.token >= cu_seqlens_q_.GetValue(row.sequence + 1)) ++row.sequence;
    const int64_t end = cu_seqlens_q_.GetValue(row.sequence + 1);
    row.keys = seq_lens_.GetValue(row.sequence) - (end - row.token) + 1;
    if (row.keys > t_->split) row.num_splits = divide_up(row.keys, t_->split);
    return row;
  }

  __aicore__ inline void load_query(const AttentionRow& row) {
    LocalTensor<T> in = query_in_.template AllocTensor<T>();
    DataCopy(in, query_[row.row * heads_size_], uint32_t(heads_size_));
    query_in_.EnQue(in);
    in = query_in_.template DeQue<T>();
    LocalTensor<float> query = query_floats_.Get<float>();
    Cast(query, in, RoundMode::CAST_NONE, uint32_t(heads_size_));
    query_in_.FreeTensor(in);
    vector_barrier();
    Muls(query, query, t_->scale, int32_t(heads_size_));
    vector_barrier();
  }

  // ---- one split ---------------------------------------------------------------------------
  // acc, max_, sum_ of the keys of split s.
  __aicore__ inline void attend(const AttentionRow& row, int64_t s) {
    Duplicate(max_.Get<float>(), kLowest, blocks_size_);
    Duplicate(sum_.Get<float>(), 0.0f, blocks_size_);
    Duplicate(acc_.Get<float>(), 0.0f, int32_t(heads_size_));
    vector_barrier();
    const int64_t begin = s * t_->split, end = smaller(begin + t_->split, row.keys);
    int64_t count = begin < end ? load_tile(row, begin, end) : 0;
    for (int64_t at = begin; at < end;) {
      const int64_t next = at + count;
      const int64_t next_count = next < end ? load_tile(row, next, end) : 0;  // in advance
      attend_tile(count);
      at = next;
      count = next_count;
    }
  }

  // The keys and values from position `at` on that lie together; returns how many.
  __aicore__ inline int64_t load_tile(const AttentionRow& row, int64_t at, int64_t end) {
    const int64_t inside = at % t_->block_size;
    const int64_t count = smaller(smaller(t_->tile, t_->block_size - inside), end - at);
    const int64_t entry = row.sequence * t_->max_blocks + at / t_->block_size;
    const int64_t page = int64_t(block_tables_.GetValue(entry)) * t_->n_kv_heads + row.head;
    const int64_t from = (page * t_->block_size + inside) * dim_;
    LocalTensor<T> pages = pages_.template AllocTensor<T>();
    DataCopy(pages, key_cache_[from], uint32_t(count * dim_));
    DataCopy(pages[t_->tile * dim_], value_cache_[from], uint32_t(count * dim_));
    pages_.EnQue(pages);
    return count;
  }

  __aicore__ inline void attend_tile(int64_t count) {
    LocalTensor<float> rows = rows_.Get<float>();
    LocalTensor<T> pages = pages_.template DeQue<T>();
    Cast(rows, pages, RoundMode::CAST_NONE, uint32_t(count * dim_));
    vector_barrier();
    for (int64_t g = 0; g < group_; ++g) score(g, count);
    Cast(rows, pages[t_->tile * dim_], RoundMode::CAST_NONE, uint32_t(count * dim_));
    pages_.FreeTensor(pages);
    softmax(count);
    for (int64_t g = 0; g < group_; ++g) add_values(g, count);
  }

  // scores[g] = K q[g]: products over 64 dimensions at a time, then a sum a key.
  __aicore__ inline void score(int64_t g, int64_t count) {
    LocalTensor<float> rows = rows_.Get<float>(), products = products_.Get<float>();
    LocalTensor<float> query = query_floats_.Get<float>()[g * dim_];
    const BinaryRepeatParams strides(1, 1, 1, 8, stride_, 0);
    for (int64_t c = 0; c < dim_; c += kVectorFloats) {
      const uint64_t mask = uint64_t(smaller(kVectorFloats, dim_ - c));
      if (c == 0) {
        Mul(products, rows, query, mask, uint8_t(count), strides);
      } else {
        MulAddDst(products, rows[c], query[c], mask, uint8_t(count), strides);
      }
      vector_barrier();
    }
    WholeReduceSum(scores_.Get<float>()[g * kVectorFloats], products,
                   int32_t(smaller(kVectorFloats, dim_)), int32_t(count), 1, 1, 8);
    vector_barrier();
  }

  // Online softmax of all heads of the group: scores become weights.
  __aicore__ inline void softmax(int64_t count) {
    LocalTensor<float> scores = scores_.Get<float>(), numbers = numbers_.Get<float>();
    LocalTensor<float> max = max_.Get<float>(), sum = sum_.Get<float>();
    LocalTensor<float> next = next_.Get<float>(), old = old_.Get<float>();
    const uint8_t group = uint8_t(group_), spreads = uint8_t(divide_up(group_, kBlockFloats));
    WholeReduceMax(numbers, scores, int32_t(count), group, 1, 1, 8, ReduceOrder::ORDER_ONLY_VALUE);
    vector_barrier();
    Brcb(next, numbers, spreads, BrcbRepeatParams(1, 8));
    vector_barrier();
    Max(next, next, max, blocks_size_);
    vector_barrier();
    Sub(old, max, next, blocks_size_);
    Sub(scores, scores, next, uint64_t(count), group, BinaryRepeatParams(1, 1, 0, 8, 8, 1));
    vector_barrier();
    Adds(max, next, 0.0f, blocks_size_);
    Exp(old, old, blocks_size_);
    Exp(scores, scores, uint64_t(count), group, UnaryRepeatParams(1, 1, 8, 8));
    vector_barrier();
    WholeReduceSum(numbers, scores, int32_t(count), group, 1, 1, 8);
    Mul(sum, sum, old, blocks_size_);
    multiply_rows(acc_.Get<float>(), old, group_, dim_);
    vector_barrier();
    Brcb(next, numbers, spreads, BrcbRepeatParams(1, 8));
    vector_barrier();
    Add(sum, sum, next, blocks_size_);
    vector_barrier();
  }

  // acc[g] += weights[g] V: weighted rows, then their sum by halving.
  __aicore__ inline void add_values(int64_t g, int64_t count) {
    LocalTensor<float> rows = rows_.Get<float>(), products = products_.Get<float>();
    LocalTensor<float> spread = spread_.Get<float>(), acc = acc_.Get<float>()[g * dim_];
    Brcb(spread, scores_.Get<float>()[g * kVectorFloats], uint8_t(divide_up(count, kBlockFloats)),
         BrcbRepeatParams(1, 8));
    vector_barrier();
    for (int64_t c = 0; c < dim_; c += kVectorFloats) {
      Mul(products[c], rows[c], spread, uint64_t(smaller(kVectorFloats, dim_ - c)), uint8_t(count),
          BinaryRepeatParams(1, 1, 0, stride_, stride_, 1));
    }
    vector_barrier();
    for (int64_t left = count; left > 1;) {
      const int64_t half = left / 2;
      left -= half;
      Add(products, products, products[left * dim_], int32_t(half * dim_));
      vector_barrier();
    }
    Add(acc, acc, products, int32_t(dim_));
    vector_barrier();
  }

  // ---- splits together -----------------------------------------------------------------------
  // total = total (+) what attend or load_partial left; the first is taken as it is.
  __aicore__ inline void merge(bool first) {
    LocalTensor<float> max = max_.Get<float>(), sum = sum_.Get<float>();
    LocalTensor<float> acc = acc_.Get<float>(), total_acc = total_acc_.Get<float>();
    LocalTensor<float> total_max = total_max_.Get<float>(), total_sum = total_sum_.Get<float>();
    LocalTensor<float> next = next_.Get<float>(), old = old_.Get<float>();
    LocalTensor<float> fresh = new_.Get<float>();
    if (first) {
      Adds(total_max, max, 0.0f, blocks_size_);
      Adds(total_sum, sum, 0.0f, blocks_size_);
      Adds(total_acc, acc, 0.0f, int32_t(heads_size_));
      vector_barrier();
      return;
    }
    Max(next, total_max, max, blocks_size_);
    vector_barrier();
    Sub(old, total_max, next, blocks_size_);
    Sub(fresh, max, next, blocks_size_);
    vector_barrier();
    Exp(old, old, blocks_size_);
    Exp(fresh, fresh, blocks_size_);
    Adds(total_max, next, 0.0f, blocks_size_);
    vector_barrier();
    Mul(total_sum, total_sum, old, blocks_size_);
    Mul(sum, sum, fresh, blocks_size_);
    multiply_rows(total_acc, old, group_, dim_);
    multiply_rows(acc, fresh, group_, dim_);
    vector_barrier();
    Add(total_sum, total_sum, sum, blocks_size_);
    Add(total_acc, total_acc, acc, int32_t(heads_size_));
    vector_barrier();
  }

  __aicore__ inline void store_partial(int64_t slot) {
    LocalTensor<float> out = partial_out_.template AllocTensor<float>();
    Adds(out, acc_.Get<float>(), 0.0f, int32_t(heads_size_));
    Adds(out[heads_size_], max_.Get<float>(), 0.0f, blocks_size_);
    Adds(out[heads_size_ + blocks_size_], sum_.Get<float>(), 0.0f, blocks_size_);
    vector_barrier();
    partial_out_.EnQue(out);
    out = partial_out_.template DeQue<float>();
    DataCopy(partials_[slot * t_->slot_floats], out, uint32_t(t_->slot_floats));
    partial_out_.FreeTensor(out);
  }

  __aicore__ inline void load_partial(int64_t slot) {
    LocalTensor<float> in = partial_in_.template AllocTensor<float>();
    DataCopy(in, partials_[slot * t_->slot_floats], uint32_t(t_->slot_floats));
    partial_in_.EnQue(in);
    in = partial_in_.template DeQue<float>();
    Adds(acc_.Get<float>(), in, 0.0f, int32_t(heads_size_));
    Adds(max_.Get<float>(), in[heads_size_], 0.0f, blocks_size_);
    Adds(sum_.Get<float>(), in[heads_size_ + blocks_size_], 0.0f, blocks_size_);
    partial_in_.FreeTensor(in);
    vector_barrier();
  }

  // out = acc / sum, lse = max + ln(sum); a row without keys gives its acc, 0, and -infinity.
  __aicore__ inline void store_result(const AttentionRow& row) {
    LocalTensor<float> acc = total_acc_.Get<float>(), sum = total_sum_.Get<float>();
    LocalTensor<T> result = result_.template AllocTensor<T>();
    LocalTensor<float> logsum = logsum_.template AllocTensor<float>();
    if (row.keys > 0) {
      const BinaryRepeatParams by_block(1, 1, 0, stride_, stride_, 1);
      for (int64_t c = 0; c < dim_; c += kVectorFloats) {
        Div(acc[c], acc[c], sum, uint64_t(smaller(kVectorFloats, dim_ - c)), uint8_t(group_),
            by_block);
      }
      Ln(logsum, sum, blocks_size_);
      vector_barrier();
      Add(logsum, logsum, total_max_.Get<float>(), blocks_size_);
    } else {
      Duplicate(logsum, kMinusInfinity, blocks_size_);
    }
    Cast(result, acc, RoundMode::CAST_RINT, uint32_t(heads_size_));
    vector_barrier();
    result_.EnQue(result);
    logsum_.EnQue(logsum);
    result = result_.template DeQue<T>();
    logsum = logsum_.template DeQue<float>();
    DataCopy(out_[row.row * heads_size_], result, uint32_t(heads_size_));
    DataCopyPad(lse_[row.row * group_], logsum,
                DataCopyExtParams(uint16_t(group_), sizeof(float), 0, 0, 0));
    result_.FreeTensor(result);
    logsum_.FreeTensor(logsum);
  }

  const PagedAttentionTiling* t_;
  int64_t group_, dim_, heads_size_;
  int32_t blocks_size_;
  uint8_t stride_;  // of a head's row, in blocks
  TPipe pipe_;
  TQue<TPosition::VECIN, 2> pages_;
  TQue<TPosition::VECIN, 1> query_in_, partial_in_;
  TQue<TPosition::VECOUT, 1> result_, logsum_, partial_out_;
  TBuf<TPosition::VECCALC> rows_, products_, spread_, scores_, numbers_, query_floats_;
  TBuf<TPosition::VECCALC> acc_, total_acc_;
  TBuf<TPosition::VECCALC> max_, sum_, total_max_, total_sum_;  // a block for each head
  TBuf<TPosition::VECCALC> next_, old_, new_;                   // maxima and factors on the way
  GlobalTensor<T> query_, key_cache_, value_cache_, out_;
  GlobalTensor<int32_t> block_tables_;
  GlobalTensor<int64_t> seq_lens_, cu_seqlens_q_;
  GlobalTensor<float> lse_, partials_;
};

template <typename T>
__aicore__ inline void run_paged_attention(const AttentionTensors& tensors,
                                           const PagedAttentionTiling* tiling) {
  PagedAttention<T> op;
  op.init(tensors, tiling);
  op.process();
  if (tiling->num_slots == 0) return;  // the same on every core
  SyncAll();
  op.combine();
}

}  // namespace ascend
}  // namespace codellama_rt

extern "C" __global__ __aicore__ void clrt_paged_attention(
    GM_ADDR query, GM_ADDR key_cache, GM_ADDR value_cache, GM_ADDR block_tables, GM_ADDR seq_lens,
    GM_ADDR cu_seqlens_q, GM_ADDR out, GM_ADDR lse, GM_ADDR workspace, GM_ADDR tiling) {
  using namespace codellama_rt::ascend;
  KERNEL_TASK_TYPE_DEFAULT(KERNEL_TYPE_MIX_AIV_1_0);  // vector cores alone, and their SyncAll
  REGISTER_TILING_DEFAULT(codellama_rt::ascend::PagedAttentionTiling);
  GET_TILING_DATA_WITH_STRUCT(codellama_rt::ascend::PagedAttentionTiling, t, tiling);
  const AttentionTensors tensors = {query,        key_cache, value_cache,
                                    block_tables, seq_lens,  cu_seqlens_q,
                                    out,          lse,       GetUserWorkspace(workspace)};
  if (t.element_type == kBFloat16) {
    run_paged_attention<bfloat16_t>(tensors, &t);
  } else {
    run_paged_attention<half>(tensors, &t);
  }
}
