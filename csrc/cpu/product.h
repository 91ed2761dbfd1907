// The matrix product in registers that knn and jad are built on, and how its operands are packed.
#pragma once
#include <algorithm>

#include "simd.h"

namespace fer::cpu::FER_ISA {
namespace {

constexpr int kRows = FER_VECTOR_BYTES == 64 ? 14 : 6;  // rows whose sums, two vectors each, fill the registers
constexpr int kPackedRows = (kRows + 3) / 4 * 4;         // row pitch of a packed tile of them

// Four rows of a vector of channels each, to packed[channel * pitch + row].
template <class A>
void store_transposed(Vec<A> a, Vec<A> b, Vec<A> d, Vec<A> e, int pitch, A* packed) {
  const Vec<A> ab_low = shuffle_groups<A, 0, 4, 1, 5>(a, b), ab_high = shuffle_groups<A, 2, 6, 3, 7>(a, b);
  const Vec<A> de_low = shuffle_groups<A, 0, 4, 1, 5>(d, e), de_high = shuffle_groups<A, 2, 6, 3, 7>(d, e);
  // columns[i] holds channels i, 4 + i, 8 + i, ..., the four rows of each side by side.
  const Vec<A> columns[4] = {
      shuffle_groups<A, 0, 1, 4, 5>(ab_low, de_low), shuffle_groups<A, 2, 3, 6, 7>(ab_low, de_low),
      shuffle_groups<A, 0, 1, 4, 5>(ab_high, de_high), shuffle_groups<A, 2, 3, 6, 7>(ab_high, de_high)};
  [&]<int... n>(std::integer_sequence<int, n...>) {
    (store_four<A>(packed + n * pitch, group<A, n / 4>(columns[n % 4])), ...);
  }(std::make_integer_sequence<int, kLanes<A>>{});
}

// Writes rows[r][c] * scale[r] to packed[c' * pitch + r]; pitch is a multiple of 4. c' is c but for
// the order in which load_pair_as() takes channels: the same for both operands, so no sum changes.
template <class A, class T>
void pack(const T* const* rows, const A* scale, int64_t channels, int pitch, A* packed) {
  constexpr int lanes = kLanes<A>;
  constexpr int64_t kChunk = 64;  // channels whose packed rows stay in the first-level cache while all rows pass
  for (int64_t chunk = 0; chunk < channels; chunk += kChunk) {
    const int64_t end = std::min(chunk + kChunk, channels);
    for (int r = 0; r < pitch; r += 4) {
      const T *p0 = rows[r], *p1 = rows[r + 1], *p2 = rows[r + 2], *p3 = rows[r + 3];
      const A s0 = scale[r], s1 = scale[r + 1], s2 = scale[r + 2], s3 = scale[r + 3];
      A* to = packed + chunk * pitch + r;
      int64_t c = chunk;
      if constexpr (lanes >= 4) {
        for (; c + 2 * lanes <= end; c += 2 * lanes, to += 2 * lanes * pitch) {
          const Pair<A> a = load_pair_as<A>(p0 + c), b = load_pair_as<A>(p1 + c);
          const Pair<A> d = load_pair_as<A>(p2 + c), e = load_pair_as<A>(p3 + c);
          store_transposed<A>(a.first * s0, b.first * s1, d.first * s2, e.first * s3, pitch, to);
          store_transposed<A>(a.second * s0, b.second * s1, d.second * s2, e.second * s3, pitch, to + lanes * pitch);
        }
        for (; c + lanes <= end; c += lanes, to += lanes * pitch)
          store_transposed<A>(load_as<A>(p0 + c) * s0, load_as<A>(p1 + c) * s1, load_as<A>(p2 + c) * s2,
                              load_as<A>(p3 + c) * s3, pitch, to);
      }
      for (; c < end; ++c, to += pitch) {
        to[0] = widen<A>(p0[c]) * s0, to[1] = widen<A>(p1[c]) * s1;
        to[2] = widen<A>(p2[c]) * s2, to[3] = widen<A>(p3[c]) * s3;
      }
    }
  }
}

// Pointers to `count` rows; the last stands in for the rest up to `pitch`, and what is computed from
// those is never looked at.
template <class T>
void point_at(const T* first, int64_t row_pitch, int count, int pitch, const T** rows) {
  for (int r = 0; r < pitch; ++r) rows[r] = first + std::min(r, count - 1) * row_pitch;
}

// sum + a * b; or (kPairs) of pairs of bfloat16 numbers in every lane both products are added.
template <bool kPairs, class A>
inline Vec<A> with_product(Vec<A> sum, Vec<A> a, Vec<A> b) {
#if defined(__AVX512BF16__)
  if constexpr (kPairs) return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#endif
  return sum + a * b;
}

// done(r, v, Σ_s a[r * kRow + s * kStep] * b[s * b_pitch + v]) for R rows r and V vectors v, over `steps`
// values of s, or those in `chosen`.
template <class A, int R, int V, int kRow, int kStep, bool kChosen = false, bool kPairs = false, class Done>
inline void product_tile(const A* a, const A* b, int64_t b_pitch, int64_t steps, const int32_t* chosen, Done done) {
  Vec<A> sums[R][V] = {};
  for (int64_t n = 0; n < steps; ++n) {
    const int64_t s = kChosen ? chosen[n] : n;
    const A *left = a + s * kStep, *right = b + s * b_pitch;
    Vec<A> y[V];
    for (int v = 0; v < V; ++v) y[v] = load(right + v * kLanes<A>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<A> x = splat(left[r * kRow]);
      for (int v = 0; v < V; ++v) sums[r][v] = with_product<kPairs, A>(sums[r][v], x, y[v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) done(r, v, sums[r][v]);
}

}  // namespace
}  // namespace fer::cpu::FER_ISA
