// Channels in the lanes of vectors, what is left over at the end of a row, and activations: what norm and linear share.
#pragma once
#include <algorithm>

#include "fer/norm.h"
#include "simd.h"

namespace fer::cpu::FER_ISA {
namespace {

// ---- vectors of channels, and what is left over at the end of a row ----

struct Whole {};

template <class A, class E>
inline Vec<A> load_lanes(const E* from, Whole) {
  return load_as<A>(from);
}
template <class A, class E>
inline Vec<A> load_lanes(const E* from, int count) {
  E lanes[kLanes<A>] = {};
#if defined(__AVX512F__)
  // lane by lane, rows of 24 channels would take two to three times as long
  const unsigned mask = (1u << count) - 1;
  if constexpr (std::is_same_v<E, float>) return _mm512_maskz_loadu_ps(mask, from);
  if constexpr (std::is_same_v<E, BFloat16>) return widen_all(_mm256_maskz_loadu_epi16(mask, from));
  if constexpr (sizeof(E) == 2) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm256_maskz_loadu_epi16(mask, from));
    return load_as<A>(lanes);
  }
#endif
  for (int l = 0; l < count; ++l) lanes[l] = from[l];
  return load_as<A>(lanes);
}

template <class A, class E>
inline void store_lanes(E* to, Vec<A> v, Whole) {
  if constexpr (std::is_same_v<E, A>) {
    store(to, v);
  } else if constexpr (std::is_same_v<E, BFloat16>) {
#if defined(__AVX512BF16__)
    const __m256bh halves = _mm512_cvtneps_pbh(v);
#else
    const Vec<uint32_t> bits = reinterpret_cast<Vec<uint32_t>>(v);
    Vec<uint32_t> rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    rounded = v == v ? rounded : splat<uint32_t>(0x7FC0u);
    typedef uint16_t Halves __attribute__((vector_size(FER_VECTOR_BYTES / 2)));
    const Halves halves = __builtin_convertvector(rounded, Halves);
#endif
    std::memcpy(to, &halves, sizeof halves);
  } else {
    A lanes[kLanes<A>];
    store(lanes, v);
    store_row(lanes, kLanes<A>, to);
  }
}
template <class A, class E>
inline void store_lanes(E* to, Vec<A> v, int count) {
  E lanes[kLanes<A>];
#if defined(__AVX512F__)
  const unsigned mask = (1u << count) - 1;
  if constexpr (std::is_same_v<E, float>) return _mm512_mask_storeu_ps(to, mask, v);
#endif
  store_lanes<A>(lanes, v, Whole{});
#if defined(__AVX512F__)
  if constexpr (sizeof(E) == 2) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(lanes));
    return _mm256_mask_storeu_epi16(to, mask, halves);
  }
#endif
  for (int l = 0; l < count; ++l) to[l] = lanes[l];
}

// f(c, Whole) for every whole vector of channels from c, then f(c, count) for what is left.
template <class A, class F>
inline void for_channels(int64_t channels, F f) {
  int64_t c = 0;
  for (; c + kLanes<A> <= channels; c += kLanes<A>) f(c, Whole{});
  if (c < channels) f(c, static_cast<int>(channels - c));
}

inline Vec<float> reciprocal(Vec<float> v) {
#if defined(__AVX512F__)
  // 14 bits and a step of Newton's, for a third of a division's time
  const Vec<float> guess = _mm512_rcp14_ps(v);
  return guess + guess * (splat(1.0f) - v * guess);
#else
  return splat(1.0f) / v;
#endif
}

// ---- GELU, z Φ(z) with the normal distribution's Φ, and its slope Φ(z) + z φ(z) ----
//
// z P(z²) / Q(z²) + 1/2, beyond ±bound as there: minimax fits, off by at most 2.4e-7 in float arithmetic. Or of
// fewer terms, for what is rounded to bfloat16: there Φ is off by at most 1.1e-5, GELU by 7e-6 and the slope by
// 7e-5, where rounding a 1 may change it by 2e-3.

template <int p, int q>
inline Vec<float> fraction(Vec<float> z, float bound, const float (&above)[p], const float (&below)[q]) {
  z = larger<float>(splat(-bound), smaller<float>(splat(bound), z));
  const Vec<float> u = z * z;
  Vec<float> top = splat(above[p - 1]), bottom = splat(below[q - 1]);
#pragma GCC unroll 8
  for (int i = p - 2; i >= 0; --i) top = top * u + splat(above[i]);
#pragma GCC unroll 8
  for (int i = q - 2; i >= 0; --i) bottom = bottom * u + splat(below[i]);
  return z * top * reciprocal(bottom) + splat(0.5f);
}
// Φ, which rounding may have taken below zero: then GELU of a large negative z had the wrong sign.
inline Vec<float> positive(Vec<float> v) { return larger<float>(Vec<float>{}, v); }
template <bool kCoarse>
inline Vec<float> gelu(Vec<float> z) {
  if constexpr (kCoarse) {
    constexpr float above[] = {0.3989063501f, 0.0284546651f, 0.0037836407f, 3.1390562e-05f};
    constexpr float below[] = {1, 0.2378163636f, 0.0242226925f, 0.0011244698f};
    return z * positive(fraction(z, 4.8f, above, below));
  } else {
    constexpr float above[] = {0.398942187f,    0.0355467652f,  0.00477795791f,
                               0.000185455528f, 6.40585926e-06f, 2.10585121e-08f};
    constexpr float below[] = {1, 0.255767708f, 0.0296072179f, 0.0019791557f, 7.86501237e-05f, 1.15194879e-06f};
    return z * positive(fraction(z, 5.8f, above, below));
  }
}
template <bool kCoarse>
inline Vec<float> gelu_slope(Vec<float> z) {
  if constexpr (kCoarse) {
    constexpr float above[] = {0.7982524037f, -0.0261634700f, 0.0140643222f, 0.0001205498f};
    constexpr float below[] = {1, 0.3026186824f, 0.0406886190f, 0.0047589843f};
    return fraction(z, 4.5f, above, below);
  } else {
    constexpr float above[] = {0.797885204f,    -0.0317013586f,  0.0142075864f,  1.04235668e-05f,
                               3.50168968e-05f, 1.66532991e-07f, 1.00622322e-10f};
    constexpr float below[] = {1, 0.293608276f, 0.0406599576f, 0.00346812518f, 0.00018809015f, 8.43311856e-06f};
    return fraction(z, 5.8f, above, below);
  }
}
template <bool kCoarse>
inline Vec<double> gelu(Vec<double> z) {
  for (int l = 0; l < kLanes<double>; ++l) z[l] *= 0.5 * std::erfc(-z[l] * 0.70710678118654752);
  return z;
}
template <bool kCoarse>
inline Vec<double> gelu_slope(Vec<double> z) {
  for (int l = 0; l < kLanes<double>; ++l)
    z[l] = 0.5 * std::erfc(-z[l] * 0.70710678118654752) + z[l] * 0.39894228040143268 * std::exp(-0.5 * z[l] * z[l]);
  return z;
}

// ---- sums over rows ----

// Four rows of a chunk at a time, so that what belongs to a channel is loaded once for four: f(r, four), then
// for the rows left over f(r, one).
template <class F>
inline void by_fours(int64_t begin, int64_t end, F f) {
  int64_t r = begin;
  for (; r + 4 <= end; r += 4) f(r, std::integral_constant<int, 4>{});
  for (; r < end; ++r) f(r, std::integral_constant<int, 1>{});
}

inline Buffer<double> zeros(int64_t count) {
  Buffer<double> made = allocate<double>(count);
  std::fill_n(made.get(), count, 0.0);
  return made;
}

// Mean and variance over `rows` rows from those of each chunk of them: its mean and the squared differences from it,
// 2 * channels numbers a chunk.
template <class A>
void merge_stats(int64_t rows, int64_t chunk_rows, int64_t channels, const double* parts, A* mean_of_all, A* var_of_all) {
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  const Buffer<double> mean = zeros(channels), square = zeros(channels);
  const auto rows_of = [&](int64_t chunk) { return static_cast<double>(std::min(chunk_rows, rows - chunk * chunk_rows)); };
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t c = 0; c < channels; ++c) mean[c] += rows_of(chunk) / static_cast<double>(rows) * parts[chunk * 2 * channels + c];
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const double* of = parts + chunk * 2 * channels;
    for (int64_t c = 0; c < channels; ++c)
      square[c] += of[channels + c] + rows_of(chunk) * (of[c] - mean[c]) * (of[c] - mean[c]);
  }
  for (int64_t c = 0; c < channels; ++c) {
    mean_of_all[c] = static_cast<A>(mean[c]);
    var_of_all[c] = static_cast<A>(square[c] / static_cast<double>(rows));
  }
}

// f(act), as a constant.
template <class F>
inline void with_activation(NormAct act, F f) {
  switch (act) {
    case NormAct::none: return f(std::integral_constant<NormAct, NormAct::none>{});
    case NormAct::relu: return f(std::integral_constant<NormAct, NormAct::relu>{});
    case NormAct::gelu: return f(std::integral_constant<NormAct, NormAct::gelu>{});
  }
}

// ---- y = act(z) with z = gain * norm + residual, and dz ----

// Of numbers that are, or will be, rounded to E.
template <NormAct act, class E, class V>
inline V activate(V z) {
  if constexpr (act == NormAct::gelu) return gelu<std::is_same_v<E, BFloat16>>(z);
  if constexpr (act == NormAct::relu) return z < V{} ? V{} : z;  // a NaN stays
  return z;
}

template <NormAct act, class E, class V>
inline V slope(V dy, V z) {
  if constexpr (act == NormAct::gelu) return dy * gelu_slope<std::is_same_v<E, BFloat16>>(z);
  if constexpr (act == NormAct::relu) return z > V{} ? dy : V{};
  return dy;
}

}  // namespace
}  // namespace fer::cpu::FER_ISA
