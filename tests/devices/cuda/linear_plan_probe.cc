// Which rows of which weight a block of linear takes (csrc/cuda/linear/linear.cuh), for Python.
#include "cuda/linear/linear.cuh"

using namespace codellama_rt;
using namespace codellama_rt::cuda;

namespace {

LinearParams params_of(const int64_t* n, int num_weights) {
  LinearParams p{};
  p.num_weights = num_weights;
  for (int i = 0; i < num_weights; ++i) {
    p.n[i] = n[i];
    p.weights[i] = n + i;
  }
  return p;
}

}  // namespace

extern "C" {

int64_t plan_count(const int64_t* n, int num_weights, int rows) {
  return count_tiles(params_of(n, num_weights), rows);
}

// The weight's number, the first of the tile's rows in it, and that row's place in the output.
void plan_tile(const int64_t* n, int num_weights, int64_t index, int rows, int64_t* out) {
  const WeightTile tile = find_tile(params_of(n, num_weights), index, rows);
  out[0] = static_cast<const int64_t*>(tile.weight) - n;
  out[1] = tile.index * rows;
  out[2] = tile.first_out + tile.index * rows;
}
}
