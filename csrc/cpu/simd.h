// Vectors as wide as the instruction set this file is compiled for, and the few operations that
// the compiler's own vector types leave open. Everything has internal linkage: the kernel files
// are compiled several times, and a shared inline function would let the linker keep one copy,
// possibly one that this processor cannot run.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__AVX512BF16__)
#define FER_ISA avx512bf16
#define FER_VECTOR_BYTES 64
#elif defined(__AVX512F__)
#define FER_ISA avx512
#define FER_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FER_ISA avx2
#define FER_VECTOR_BYTES 32
#else
#define FER_ISA baseline
#define FER_VECTOR_BYTES 16
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "fer/dtype.h"

namespace fer::cpu::FER_ISA {
namespace {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(FER_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = FER_VECTOR_BYTES / sizeof(T);

template <class T>
inline Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class T>
inline void store(T* to, Vec<T> v) {
  std::memcpy(to, &v, sizeof v);
}
template <class T>
inline Vec<T> splat(T value) {
  return value - Vec<T>{};  // not 0 + value: the compiler must keep that, it turns -0 into +0
}

template <class T>
struct AlignedDelete {
  void operator()(T* p) const { ::operator delete[](p, std::align_val_t(64)); }
};
template <class T>
using Buffer = std::unique_ptr<T[], AlignedDelete<T>>;
template <class T>
Buffer<T> allocate(int64_t count) {
  return Buffer<T>(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t(64))));
}

// a < b ? a : b in every lane, that is b where either is NaN.
template <class T>
inline Vec<T> smaller(Vec<T> a, Vec<T> b) {
  return a < b ? a : b;
}
// a > b ? a : b, likewise.
template <class T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
template <class T>
inline T total(Vec<T> v) {
  T sum = 0;
  for (int l = 0; l < kLanes<T>; ++l) sum += v[l];
  return sum;
}
template <class T>
inline T least(Vec<T> v) {
  T low = v[0];
  for (int l = 1; l < kLanes<T>; ++l) low = v[l] < low ? v[l] : low;
  return low;
}

// ---- groups of four lanes ----

template <class T>
struct FourOf {
  typedef T type __attribute__((vector_size(4 * sizeof(T))));
};
template <class T>
using Four = typename FourOf<T>::type;

// In every group of four lanes: those lanes of a's group (0 to 3) and of b's (4 to 7).
template <class T, int i0, int i1, int i2, int i3>
inline Vec<T> shuffle_groups(Vec<T> a, Vec<T> b) {
  return [&]<int... l>(std::integer_sequence<int, l...>) {
    constexpr int from[4] = {i0, i1, i2, i3};
    return __builtin_shufflevector(
        a, b, (l / 4 * 4 + from[l % 4] % 4 + (from[l % 4] < 4 ? 0 : kLanes<T>))...);
  }(std::make_integer_sequence<int, kLanes<T>>{});
}
template <class T>
inline void store_four(T* to, Four<T> v) {
  std::memcpy(to, &v, sizeof v);
}
template <class T, int g>
inline Four<T> group(Vec<T> v) {
  return __builtin_shufflevector(v, v, 4 * g, 4 * g + 1, 4 * g + 2, 4 * g + 3);
}

// Group g in all groups.
template <class T, int g>
inline Vec<T> repeated(Vec<T> v) {
  return [&]<int... l>(std::integer_sequence<int, l...>) {
    return __builtin_shufflevector(v, v, (4 * g + l % 4)...);
  }(std::make_integer_sequence<int, kLanes<T>>{});
}

// Signed integers of the width of a float type: what vector comparisons yield.
template <class T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
template <class T>
using Int = typename IntOf<T>::type;

// best and its slot become value and s where value is larger, or the first NaN.
template <class T>
inline void keep_larger(Vec<T> value, int s, Vec<T>& best, Vec<Int<T>>& slot) {
  const auto wins = ~(value <= best) & (best == best);
  best = wins ? value : best;
  slot = wins ? splat<Int<T>>(s) : slot;
}

// counts + 1 in every lane where a <= b (a < b).
template <class T, class N>
inline Vec<N> count_le(Vec<N> counts, Vec<T> a, Vec<T> b) {
  return counts - (a <= b);
}
template <class T, class N>
inline Vec<N> count_lt(Vec<N> counts, Vec<T> a, Vec<T> b) {
  return counts - (a < b);
}

// Bit l is set where not (d[l] >= bound[l]): below the bound, or unordered.
template <class T>
inline uint32_t below_or_nan(Vec<T> d, Vec<T> bound) {
  uint32_t bits = 0;
  for (int l = 0; l < kLanes<T>; ++l) bits |= static_cast<uint32_t>(!(d[l] >= bound[l])) << l;
  return bits;
}

// Appends the chosen lanes of d and their indices first + l; up to a vector beyond may be overwritten.
template <class T>
inline int append(uint32_t chosen, Vec<T> d, int first, T* values, int32_t* indices) {
  int n = 0;
  for (; chosen; chosen &= chosen - 1, ++n) {
    const int lane = __builtin_ctz(chosen);
    values[n] = d[lane];
    indices[n] = first + lane;
  }
  return n;
}

#if defined(__AVX512F__)
template <>
inline Vec<float> smaller<float>(Vec<float> a, Vec<float> b) {
  return _mm512_min_ps(a, b);
}
template <>
inline Vec<float> larger<float>(Vec<float> a, Vec<float> b) {
  return _mm512_max_ps(a, b);
}
template <>
inline void keep_larger<float>(Vec<float> value, int s, Vec<float>& best, Vec<int32_t>& slot) {
  const __mmask16 wins = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(best, best, _CMP_ORD_Q), value, best, _CMP_NLE_UQ);
  best = _mm512_mask_mov_ps(best, wins, value);
  slot = reinterpret_cast<Vec<int32_t>>(_mm512_mask_set1_epi32(reinterpret_cast<__m512i>(slot), wins, s));
}
template <>
inline float total<float>(Vec<float> v) {
  return _mm512_reduce_add_ps(v);
}
template <>
inline float least<float>(Vec<float> v) {
  return _mm512_reduce_min_ps(v);
}
template <>
inline Vec<int32_t> count_le<float, int32_t>(Vec<int32_t> counts, Vec<float> a, Vec<float> b) {
  const __m512i c = reinterpret_cast<__m512i>(counts);
  const __mmask16 le = _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ);
  return reinterpret_cast<Vec<int32_t>>(_mm512_mask_add_epi32(c, le, c, _mm512_set1_epi32(1)));
}
template <>
inline Vec<int32_t> count_le<int32_t, int32_t>(Vec<int32_t> counts, Vec<int32_t> a, Vec<int32_t> b) {
  const __m512i c = reinterpret_cast<__m512i>(counts);
  const __mmask16 le = _mm512_cmple_epi32_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
  return reinterpret_cast<Vec<int32_t>>(_mm512_mask_add_epi32(c, le, c, _mm512_set1_epi32(1)));
}
template <>
inline Vec<int32_t> count_lt<int32_t, int32_t>(Vec<int32_t> counts, Vec<int32_t> a, Vec<int32_t> b) {
  const __m512i c = reinterpret_cast<__m512i>(counts);
  const __mmask16 lt = _mm512_cmplt_epi32_mask(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b));
  return reinterpret_cast<Vec<int32_t>>(_mm512_mask_add_epi32(c, lt, c, _mm512_set1_epi32(1)));
}
template <>
inline uint32_t below_or_nan<float>(Vec<float> d, Vec<float> bound) {
  return _mm512_cmp_ps_mask(d, bound, _CMP_NGE_UQ);
}
template <>
inline uint32_t below_or_nan<double>(Vec<double> d, Vec<double> bound) {
  return _mm512_cmp_pd_mask(d, bound, _CMP_NGE_UQ);
}
template <>
inline int append<float>(uint32_t chosen, Vec<float> d, int first, float* values, int32_t* indices) {
  const __mmask16 mask = static_cast<__mmask16>(chosen);
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  // Compressing in a register and storing it whole is far cheaper than a compressing store.
  _mm512_storeu_ps(values, _mm512_maskz_compress_ps(mask, d));
  _mm512_storeu_si512(indices, _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(lanes, _mm512_set1_epi32(first))));
  return __builtin_popcount(chosen);
}
#elif defined(__AVX2__)
template <>
inline uint32_t below_or_nan<float>(Vec<float> d, Vec<float> bound) {
  return _mm256_movemask_ps(_mm256_cmp_ps(d, bound, _CMP_NGE_UQ));
}
template <>
inline uint32_t below_or_nan<double>(Vec<double> d, Vec<double> bound) {
  return _mm256_movemask_pd(_mm256_cmp_pd(d, bound, _CMP_NGE_UQ));
}
#endif

// Lane l of the result is the sum of v[l]'s lanes. Overwrites v.
template <class T, int n = kLanes<T> / 2>
inline Vec<T> total_of_each(Vec<T>* v) {
  if constexpr (n == 0) {
    return v[0];
  } else {
    // Lanes whose bit n is clear go on with v[i], the others with v[i + n]; each adds its partner.
    [&]<int... l>(std::integer_sequence<int, l...>) {
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i)
        v[i] = __builtin_shufflevector(v[i], v[i + n], (l & n ? l + kLanes<T> : l)...) +
               __builtin_shufflevector(v[i], v[i + n], (l & n ? (l ^ n) + kLanes<T> : l ^ n)...);
    }(std::make_integer_sequence<int, kLanes<T>>{});
    return total_of_each<T, n / 2>(v);
  }
}

// e to the x, for x up to 0 (the largest of a softmax is subtracted first), -inf and NaN. Exactly 1 for 0.
inline Vec<float> exponential(Vec<float> x) {
  const auto too_small = x < splat(-87.3f);
  x = too_small ? splat(-87.3f) : x;
  const Vec<float> shifted = x * splat(1.44269504088896341f) + splat(12582912.0f);  // 1.5 * 2^23: drops the fraction
  const Vec<float> whole = shifted - splat(12582912.0f);
  const Vec<float> r = (x - whole * splat(0.693359375f)) + whole * splat(2.12194440e-4f);
  Vec<float> series = splat(1.9875691500e-4f);
  series = series * r + splat(1.3981999507e-3f);
  series = series * r + splat(8.3334519073e-3f);
  series = series * r + splat(4.1665795894e-2f);
  series = series * r + splat(1.6666665459e-1f);
  series = series * r + splat(5.0000001201e-1f);
  const Vec<float> power = (series * r) * r + (r + splat(1.0f));
  const Vec<int32_t> exponent = reinterpret_cast<Vec<int32_t>>(shifted) << 23;
  const Vec<float> scaled = reinterpret_cast<Vec<float>>(reinterpret_cast<Vec<int32_t>>(splat(1.0f)) + exponent) * power;
  return too_small ? Vec<float>{} : scaled;
}
inline Vec<double> exponential(Vec<double> x) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = std::exp(x[l]);
  return x;
}

// ---- input elements ----

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To>
inline To widen(To value) {
  return value;
}
template <class To>
inline To widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
template <class To>
inline To widen(Float16 value) {
#if defined(__F16C__)
  return _cvtsh_ss(value.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1F, fraction = value.bits & 0x3FF;
  uint32_t bits;
  float result;
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24
    result = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    std::memcpy(&bits, &result, sizeof bits);
    bits |= sign;
  } else {
    bits = sign | ((exponent == 31 ? 255 : exponent + 112) << 23) | (fraction << 13);
  }
  std::memcpy(&result, &bits, sizeof result);
  return result;
#endif
}

// A vector of input elements as accumulation type To.
template <class To, class From>
inline Vec<To> load_as(const From* from) {
  Vec<To> v;
  for (int l = 0; l < kLanes<To>; ++l) v[l] = widen<To>(from[l]);
  return v;
}

template <>
inline Vec<float> load_as<float, float>(const float* from) {
  return load(from);
}
template <>
inline Vec<double> load_as<double, double>(const double* from) {
  return load(from);
}
#if defined(__AVX512F__)
// BFloat16 numbers; one instruction, where the compiler makes four of a conversion.
inline Vec<float> widen_all(__m256i bits) {
  return reinterpret_cast<Vec<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
#endif
template <>
inline Vec<float> load_as<float, BFloat16>(const BFloat16* from) {
#if defined(__AVX512F__)
  return widen_all(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  typedef uint16_t Halves __attribute__((vector_size(FER_VECTOR_BYTES / 2)));
  Halves bits;
  std::memcpy(&bits, from, sizeof bits);
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(bits, Vec<uint32_t>) << 16);
#endif
}
#if defined(__F16C__)
template <>
inline Vec<float> load_as<float, Float16>(const Float16* from) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
}
#endif

// Two vectors' worth of input elements, in any order that depends on nothing but the types.
template <class To>
struct Pair {
  Vec<To> first, second;
};
template <class To, class From>
inline Pair<To> load_pair_as(const From* from) {
  return {load_as<To>(from), load_as<To>(from + kLanes<To>)};
}
template <>
inline Pair<float> load_pair_as<float, BFloat16>(const BFloat16* from) {
  // Even and odd elements lie in the lower and upper halves of 32-bit lanes: one instruction each.
  Vec<uint32_t> bits;
  std::memcpy(&bits, from, sizeof bits);
  return {reinterpret_cast<Vec<float>>(bits << 16), reinterpret_cast<Vec<float>>(bits & 0xFFFF0000u)};
}

// ---- output elements: rounded to nearest even, as torch rounds ----

template <class T, class From>
inline T narrow(From value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    if (value != value) return {0x7FC0};
    return {static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)};
  } else if constexpr (std::is_same_v<T, Float16>) {
#if defined(__F16C__)
    return {static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT))};
#else
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    bits &= 0x7FFFFFFF;
    if (bits > 0x7F800000) return {static_cast<uint16_t>(sign | 0x7E00)};
    if (bits >= 0x47800000) return {static_cast<uint16_t>(sign | 0x7C00)};  // 65536 and more
    if (bits < 0x38800000) {  // subnormal: adding 0.5 leaves units of 2^-24, rounded by the addition itself
      float magnitude;
      std::memcpy(&magnitude, &bits, sizeof magnitude);
      magnitude += 0.5f;
      std::memcpy(&bits, &magnitude, sizeof bits);
      return {static_cast<uint16_t>(sign | (bits - 0x3F000000))};
    }
    return {static_cast<uint16_t>(sign | ((bits - 0x38000000 + 0xFFF + ((bits >> 13) & 1)) >> 13))};
#endif
  } else {
    return value;
  }
}

// Calls f with (accumulation type, element type) of this dtype.
template <class F>
void with_types(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32: return f(float{}, float{});
    case Dtype::f64: return f(double{}, double{});
    case Dtype::bf16: return f(float{}, BFloat16{});
    case Dtype::f16: return f(float{}, Float16{});
  }
}

// ---- rows ----

// `count` rounded up to whole vectors.
template <class A>
constexpr int64_t padded(int64_t count) {
  return (count + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// A row of input elements as accumulation type, filled up with zeros to `padded` (a multiple of the lanes).
template <class To, class From>
inline void load_row(const From* from, int64_t count, int64_t padded, To* to) {
  int64_t c = 0;
  for (; c + kLanes<To> <= count; c += kLanes<To>) store(to + c, load_as<To>(from + c));
  for (; c < count; ++c) to[c] = widen<To>(from[c]);
  for (; c < padded; ++c) to[c] = 0;
}

template <class To, class From>
inline void store_row(const From* from, int64_t count, To* to) {
  int64_t c = 0;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<To, Float16>)
    for (; c + 16 <= count; c += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + c),
                          _mm512_cvtps_ph(_mm512_loadu_ps(from + c), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; c < count; ++c) to[c] = narrow<To>(from[c]);
}

}  // namespace
}  // namespace fer::cpu::FER_ISA
