// How attention's work is cut (csrc/cuda/attention/plan.cuh), for Python: every unit of the split
// kernel and every block of the unsplit ones, as an emulated warp finds them, for lengths that no
// emulated run of the kernels reaches.
#include "cuda/attention/plan.cuh"

using namespace codellama_rt::cuda;
namespace emu = codellama_rt::emu;

namespace {

struct Case {
  const int32_t *cu_seqlens_q, *seq_lens, *block_tables;
  int32_t num_seqs, n_heads, n_kv_heads, block_size, max_blocks, few_queries, causal;
};

Attention attention_of(const Case& c) {
  Attention a{};
  a.cu_seqlens_q = c.cu_seqlens_q;
  a.seq_lens = c.seq_lens;
  a.block_tables = c.block_tables;
  a.num_seqs = c.num_seqs;
  a.num_tokens = c.cu_seqlens_q[c.num_seqs];
  a.n_heads = c.n_heads;
  a.n_kv_heads = c.n_kv_heads;
  a.block_size = c.block_size;
  a.max_blocks = c.max_blocks;
  a.few_queries = c.few_queries;
  a.causal = c.causal;
  return a;
}

template <typename Body>
void by_a_warp(const Body& body) {
  emu::launch([&] { body(threadIdx.x == 0); }, dim3(1), kWarp, 0);
}

}  // namespace

extern "C" {

// units, partial rows, tickets of the whole batch.
void plan_totals(const Case* c, int32_t* out) {
  const Attention a = attention_of(*c);
  by_a_warp([&](bool leads) {
    const Totals totals = totals_of(a, a.num_seqs);
    if (!leads) return;
    out[0] = totals.units;
    out[1] = totals.partial_rows;
    out[2] = totals.tickets;
  });
}

// The units of one worker, 12 numbers each: the segment (6), where its partial rows begin, where
// its node's do, its node's and its group's counters, its split, its group's number of splits.
int plan_units(const Case* c, int worker, int num_workers, int32_t* out) {
  const Attention a = attention_of(*c);
  int32_t totals[3];
  plan_totals(c, totals);
  const Range range = share_out(totals[0], worker, num_workers);
  if (range.first == range.end) return 0;
  UnitCursor unit;
  by_a_warp([&](bool leads) {
    const UnitCursor found(a, range.first);
    if (leads) unit = found;
  });
  for (int i = range.first;; unit.advance(a)) {
    const Segment s = unit.segment(a);
    const int node = unit.split() / kNode, splits = unit.share().splits;
    const int32_t row[12] = {s.seq,
                             s.kv_head,
                             s.first_row,
                             s.end_row,
                             s.first_key,
                             s.end_key,
                             unit.partial_row(unit.split()),
                             unit.partial_row(splits + node),
                             unit.ticket(node),
                             unit.ticket(unit.share().nodes()),
                             unit.split(),
                             splits};
    for (int j = 0; j < 12; ++j) *out++ = row[j];
    if (++i == range.end) return range.end - range.first;
  }
}

// Block number `block` of the unsplit kernels of `rows` rows: its segment; 0 if there is none.
int plan_block(const Case* c, int block, int rows, int few_too, int32_t* out) {
  Attention a = attention_of(*c);
  a.few_too = few_too;  // without partials nothing fits
  Segment s;
  bool found = false;
  by_a_warp([&](bool leads) {
    Segment mine;
    const bool here = find_block(a, block, rows, &mine);
    if (!leads) return;
    found = here;
    s = mine;
  });
  if (!found) return 0;
  const int32_t row[5] = {s.seq, s.first_row, s.end_row, s.first_key, s.end_key};
  for (int j = 0; j < 5; ++j) out[j] = row[j];
  return 1;
}

int plan_visible_keys(const Case* c, int seq, int row) {
  return visible_keys(attention_of(*c), seq, row);
}
int64_t plan_output_row(const Case* c, int seq, int kv_head, int row) {
  return output_row(attention_of(*c), {seq, kv_head, 0, 0, 0, 0}, row);
}
int64_t plan_key_row(const Case* c, int seq, int kv_head, int key) {
  return key_row(attention_of(*c), seq, kv_head, key);
}
}
