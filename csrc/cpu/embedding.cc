// embedding: out[t] = table[token_ids[t]]
// Shapes   token_ids (num_tokens); table (vocab_size, dim); out (num_tokens, dim)
// Traffic  num_tokens * dim * (table itemsize + out itemsize) bytes, once each
// Limit    memory
// Tiling   rows in groups of 32 KiB
// Numerics a conversion: exact when out is no narrower than the table
#include "../ops.h"
#include "task.h"
#include "vec.h"

namespace codellama_rt {
namespace CLRT_ISA {
void embedding(const EmbeddingParams& p) {
  with_type(p.table_dtype, [&](auto table_type) {
    with_type(p.out_dtype, [&](auto out_type) {
      const auto* table = static_cast<const decltype(table_type)*>(p.table);
      auto* out = static_cast<decltype(out_type)*>(p.out);
      for_each_row(p.num_tokens, p.dim * item_size(p.out_dtype), [&](int64_t t) {
        convert(table + p.token_ids[t] * p.dim, out + t * p.dim, p.dim);
      });
    });
  });
}

}  // namespace CLRT_ISA
}  // namespace codellama_rt
