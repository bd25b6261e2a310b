// RoPE of kEach consecutive elements of a head, as apply_rotary_pos_emb and rope_and_cache need it.
#pragma once

#include "common.cuh"

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

// Elements [first, first + kEach) of the rotated head; cos and sin: the position's rows.
template <typename T, int kEach>
CLRT_DEVICE void rotate_piece(const T* head, const float* cos, const float* sin, int first,
                              int half, bool interleaved, float (&out)[kEach]) {
  float x[kEach];
  load_piece(head + first, x);
  if (interleaved) {
    for (int i = 0; i < kEach; i += 2) {
      const float c = cos[(first + i) / 2], s = sin[(first + i) / 2];
      out[i] = __fmaf_rn(x[i], c, -__fmul_rn(x[i + 1], s));
      out[i + 1] = __fmaf_rn(x[i + 1], c, __fmul_rn(x[i], s));
    }
    return;
  }
  const bool is_second = first >= half;
  float other[kEach];
  load_piece(head + (is_second ? first - half : first + half), other);
  for (int i = 0; i < kEach; ++i) {
    const int pair = first + i - (is_second ? half : 0);
    const float turned = __fmul_rn(other[i], sin[pair]);
    out[i] = __fmaf_rn(x[i], cos[pair], is_second ? turned : -turned);
  }
}

inline void require_head_dim(const char* op, int64_t head_dim) {
  const int64_t piece = head_dim <= kWarp * kSmallPiece ? kSmallPiece : kLargePiece;
  if (head_dim % (2 * piece) == 0 && head_dim <= kWarp * kLargePiece) return;
  refuse(op, "head_dim must be a multiple of 8 up to 128, or of 16 up to 256, got " +
                 std::to_string(head_dim));
}

}  // namespace cuda
}  // namespace codellama_rt
