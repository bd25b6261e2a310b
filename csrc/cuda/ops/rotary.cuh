// RoPE of kEach consecutive elements of a head, as apply_rotary_pos_emb and rope_and_cache need it.
#pragma once

#include "cuda/runtime/common.cuh"

namespace codellama_rt {
namespace cuda {

// A warp takes a head: 32 lanes of kEach elements cover head_dim up to 32 * kEach; both halves of a
// head consist of whole pieces.
constexpr int kSmallPiece = 4, kLargePiece = 8;  // head_dim up to 128, and up to 256

template <typename T, int kEach>
CLRT_DEVICE void load_piece(const T* x, float (&out)[kEach]) {
  const auto piece = *reinterpret_cast<const Vector<T, kEach>*>(x);
  for (int i = 0; i < kEach; ++i) out[i] = to_float(piece.elements[i]);
}

template <typename T, int kEach>
CLRT_DEVICE void store_piece(T* x, const float (&in)[kEach]) {
  Vector<T, kEach> piece;
  for (int i = 0; i < kEach; ++i) piece.elements[i] = from_float<T>(in[i]);
  *reinterpret_cast<Vector<T, kEach>*>(x) = piece;
}

// Where the elements lie that are turned with those from `first` on; half: of head_dim.
CLRT_DEVICE int other_half(int first, int half) {
  return first < half ? first + half : first - half;
}

// The angles of elements [first, first + kEach) of a head: the same for every head of a token.
template <int kEach>
struct Angles {
  float cos[kEach], sin[kEach];  // interleaved: the first halves of these, an angle a pair
  bool interleaved;

  // `at`: where the position's row of the tables begins.
  CLRT_DEVICE Angles(const float* cos_table, const float* sin_table, int64_t at, int first,
                     int half, bool is_interleaved)
      : interleaved(is_interleaved) {
    const int pair = interleaved ? first / 2 : first % half,
              count = interleaved ? kEach / 2 : kEach;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (i >= count) continue;
      cos[i] = cos_table[at + pair + i];
      sin[i] = sin_table[at + pair + i];
    }
    is_second = !interleaved && first >= half;
  }

  // x becomes its rotation; other: the elements at other_half (interleaved: not looked at).
  CLRT_DEVICE void rotate(float (&x)[kEach], const float (&other)[kEach]) const {
    if (interleaved) {
#pragma unroll
      for (int i = 0; i < kEach; i += 2) {
        const float even = x[i], odd = x[i + 1], c = cos[i / 2], s = sin[i / 2];
        x[i] = __fmaf_rn(even, c, -__fmul_rn(odd, s));
        x[i + 1] = __fmaf_rn(odd, c, __fmul_rn(even, s));
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float turned = __fmul_rn(other[i], sin[i]);
      x[i] = __fmaf_rn(x[i], cos[i], is_second ? turned : -turned);
    }
  }

 private:
  bool is_second;  // of the two halves of a head that is not interleaved
};

inline void require_head_dim(const char* op, int64_t head_dim) {
  const int64_t piece = head_dim <= kWarp * kSmallPiece ? kSmallPiece : kLargePiece;
  if (head_dim % (2 * piece) == 0 && head_dim <= kWarp * kLargePiece) return;
  refuse(op, "head_dim must be a multiple of 8 up to 128, or of 16 up to 256, got " +
                 std::to_string(head_dim));
}

}  // namespace cuda
}  // namespace codellama_rt
