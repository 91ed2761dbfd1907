// norm on the CPU: batch norm of rows, and what follows it in the same passes. Compiled once for every
// instruction set (see simd.h).
//
// Rows are contiguous and channels lie in the lanes, so a pass streams through memory, and statistics are
// vectors of channels. A chunk of rows is summed in the accumulation type, and chunks are put together in
// double, in their order.
// The backward pass reads x and the gradient twice and computes the activation's slope anew each time,
// which costs less than writing it down.
#include "kernels.h"

#include <algorithm>

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
    const Vec<uint32_t> bits = reinterpret_cast<Vec<uint32_t>>(v);
    Vec<uint32_t> rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    rounded = v == v ? rounded : splat<uint32_t>(0x7FC0u);
    typedef uint16_t Halves __attribute__((vector_size(FER_VECTOR_BYTES / 2)));
    const Halves halves = __builtin_convertvector(rounded, Halves);
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

// A pass over four rows at once is many short streams, which the processor does not foresee.
template <class E>
inline void fetch_ahead(const E* rows, int64_t channels) {
  __builtin_prefetch(rows + 4 * channels);
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

// z P(z²) / Q(z²) + 1/2, beyond ±5.8 as there: minimax fits, off by at most 2.4e-7 in float arithmetic.
template <int p, int q>
inline Vec<float> fraction(Vec<float> z, const float (&above)[p], const float (&below)[q]) {
  const Vec<float> bound = splat(5.8f);
  z = z > bound ? bound : z;
  z = z < -bound ? -bound : z;
  const Vec<float> u = z * z;
  Vec<float> top = splat(above[p - 1]), bottom = splat(below[q - 1]);
#pragma GCC unroll 8
  for (int i = p - 2; i >= 0; --i) top = top * u + splat(above[i]);
#pragma GCC unroll 8
  for (int i = q - 2; i >= 0; --i) bottom = bottom * u + splat(below[i]);
  return z * top * reciprocal(bottom) + splat(0.5f);
}
inline Vec<float> gelu(Vec<float> z) {
  constexpr float above[] = {0.398942187f,    0.0355467652f,  0.00477795791f,
                             0.000185455528f, 6.40585926e-06f, 2.10585121e-08f};
  constexpr float below[] = {1, 0.255767708f, 0.0296072179f, 0.0019791557f, 7.86501237e-05f, 1.15194879e-06f};
  return z * fraction(z, above, below);
}
inline Vec<float> gelu_slope(Vec<float> z) {
  constexpr float above[] = {0.797885204f,    -0.0317013586f,  0.0142075864f,  1.04235668e-05f,
                             3.50168968e-05f, 1.66532991e-07f, 1.00622322e-10f};
  constexpr float below[] = {1, 0.293608276f, 0.0406599576f, 0.00346812518f, 0.00018809015f, 8.43311856e-06f};
  return fraction(z, above, below);
}
inline Vec<double> gelu(Vec<double> z) {
  for (int l = 0; l < kLanes<double>; ++l) z[l] *= 0.5 * std::erfc(-z[l] * 0.70710678118654752);
  return z;
}
inline Vec<double> gelu_slope(Vec<double> z) {
  for (int l = 0; l < kLanes<double>; ++l)
    z[l] = 0.5 * std::erfc(-z[l] * 0.70710678118654752) + z[l] * 0.39894228040143268 * std::exp(-0.5 * z[l] * z[l]);
  return z;
}

// ---- y = act(z) with z = gain * norm + residual, and dz ----

template <NormAct act, class V>
inline V activate(V z) {
  if constexpr (act == NormAct::gelu) return gelu(z);
  if constexpr (act == NormAct::relu) return z < V{} ? V{} : z;  // a NaN stays
  return z;
}

template <NormAct act, class V>
inline V slope(V dy, V z) {
  if constexpr (act == NormAct::gelu) return dy * gelu_slope(z);
  if constexpr (act == NormAct::relu) return z > V{} ? dy : V{};
  return dy;
}

// f(act, joined) with the call's activation, and whether there is a residual, as constants.
template <class F>
inline void with_act(const NormCall& call, F f) {
  const auto join = [&](auto act) { call.residual ? f(act, std::true_type{}) : f(act, std::false_type{}); };
  switch (call.act) {
    case NormAct::none: return join(std::integral_constant<NormAct, NormAct::none>{});
    case NormAct::relu: return join(std::integral_constant<NormAct, NormAct::relu>{});
    case NormAct::gelu: return join(std::integral_constant<NormAct, NormAct::gelu>{});
  }
}

// The gains of `count` rows from row r.
template <class A>
struct Gains {
  A of[4] = {1, 1, 1, 1};
  Gains(const NormCall& call, int64_t r, int count) {
    if (call.gain)
      for (int i = 0; i < count; ++i)
        of[i] = static_cast<const A*>(call.gain)[(r + i) / (call.rows / call.samples)];
  }
};

// ---- a channel's constants ----

// norm = (x - mean) * scale + bias
template <class A>
struct Constants {
  Buffer<A> mean, scale, bias, rstd;
};

template <class A>
Constants<A> constants(const NormCall& call, const A* mean, const A* var) {
  const int64_t size = padded<A>(call.channels);
  Constants<A> of{allocate<A>(size), allocate<A>(size), allocate<A>(size), allocate<A>(size)};
  const A *weight = static_cast<const A*>(call.weight), *bias = static_cast<const A*>(call.bias);
  for (int64_t c = 0; c < size; ++c) {
    const bool real = c < call.channels;
    of.mean[c] = real ? mean[c] : 0;
    of.rstd[c] = real ? 1 / std::sqrt(var[c] + static_cast<A>(call.eps)) : 0;
    of.scale[c] = real && weight ? of.rstd[c] * weight[c] : of.rstd[c];
    of.bias[c] = real && bias ? bias[c] : 0;
  }
  return of;
}

// ---- sums over the rows of a chunk, and of all ----

inline Buffer<double> zeros(int64_t count) {
  Buffer<double> made = allocate<double>(count);
  std::fill_n(made.get(), count, 0.0);
  return made;
}

// Four rows of a chunk at a time, so that what belongs to a channel is loaded once for four: f(r, four), then
// for the rows left over f(r, one).
template <class F>
inline void by_fours(int64_t begin, int64_t end, F f) {
  int64_t r = begin;
  for (; r + 4 <= end; r += 4) f(r, std::integral_constant<int, 4>{});
  for (; r < end; ++r) f(r, std::integral_constant<int, 1>{});
}

template <class A, class E>
void stats(const NormForward& call, double* parts, int64_t begin, int64_t end) {
  const int64_t channels = call.channels, size = padded<A>(channels);
  const Buffer<A> centre = allocate<A>(size), sum = allocate<A>(size), square = allocate<A>(size);
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    const int64_t rows = std::min(kNormRows, call.rows - chunk * kNormRows);
    const E* x = static_cast<const E*>(call.x) + chunk * kNormRows * channels;
    // Differences from the mean of the chunk's first rows: where that is near the chunk's own mean, little
    // cancels when the square of what lies between them is taken off.
    const int64_t few = std::min<int64_t>(8, rows);
    std::fill_n(centre.get(), size, A(0));
    for (int64_t r = 0; r < few; ++r)
      for_channels<A>(channels, [&](int64_t c, auto part) {
        store(centre.get() + c, load(centre.get() + c) + load_lanes<A>(x + r * channels + c, part));
      });
    for (int64_t c = 0; c < size; ++c) centre[c] /= static_cast<A>(few);
    std::fill_n(sum.get(), size, A(0));
    std::fill_n(square.get(), size, A(0));
    by_fours(0, rows, [&](int64_t r, auto count) {
      for_channels<A>(channels, [&](int64_t c, auto part) {
        const Vec<A> from = load(centre.get() + c);
        Vec<A> s{}, q{};
        for (int i = 0; i < count; ++i) {
          fetch_ahead(x + (r + i) * channels + c, channels);
          const Vec<A> d = load_lanes<A>(x + (r + i) * channels + c, part) - from;
          s += d;
          q += d * d;
        }
        store(sum.get() + c, load(sum.get() + c) + s);
        store(square.get() + c, load(square.get() + c) + q);
      });
    });
    double* to = parts + chunk * 2 * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const double mean = static_cast<double>(sum[c]) / rows;
      to[c] = centre[c] + mean;
      to[channels + c] = std::max(square[c] - sum[c] * mean, 0.0);  // a NaN stays
    }
  }
}

template <class A>
void merge_stats(const NormForward& call, const double* parts) {
  const int64_t channels = call.channels;
  const double rows = static_cast<double>(call.rows);
  const Buffer<double> mean = zeros(channels), square = zeros(channels);
  const auto rows_of = [&](int64_t chunk) {
    return static_cast<double>(std::min(kNormRows, call.rows - chunk * kNormRows));
  };
  for (int64_t chunk = 0; chunk < call.chunks(); ++chunk)
    for (int64_t c = 0; c < channels; ++c) mean[c] += rows_of(chunk) / rows * parts[chunk * 2 * channels + c];
  for (int64_t chunk = 0; chunk < call.chunks(); ++chunk) {
    const double* of = parts + chunk * 2 * channels;
    for (int64_t c = 0; c < channels; ++c)
      square[c] += of[channels + c] + rows_of(chunk) * (of[c] - mean[c]) * (of[c] - mean[c]);
  }
  for (int64_t c = 0; c < channels; ++c) {
    static_cast<A*>(call.mean)[c] = static_cast<A>(mean[c]);
    static_cast<A*>(call.var)[c] = static_cast<A>(square[c] / rows);
  }
}

template <class A, class E, class R>
void apply(const NormForward& call, int64_t begin, int64_t end) {
  const int64_t channels = call.channels;
  const auto of = constants(call, static_cast<const A*>(call.mean), static_cast<const A*>(call.var));
  const E* x = static_cast<const E*>(call.x);
  const R* residual = static_cast<const R*>(call.residual);
  R* y = static_cast<R*>(call.y);
  with_act(call, [&](auto act, auto joined) {
    by_fours(begin * kNormRows, std::min(end * kNormRows, call.rows), [&](int64_t r, auto count) {
      const Gains<A> gains(call, r, count);
      for_channels<A>(channels, [&](int64_t c, auto part) {
        const Vec<A> mean = load(of.mean.get() + c), scale = load(of.scale.get() + c), bias = load(of.bias.get() + c);
        for (int i = 0; i < count; ++i) {
          const int64_t at = (r + i) * channels + c;
          fetch_ahead(x + at, channels);
          Vec<A> z = ((load_lanes<A>(x + at, part) - mean) * scale + bias) * gains.of[i];
          if constexpr (joined()) z += load_lanes<A>(residual + at, part);
          store_lanes<A>(y + at, activate<act()>(z), part);
        }
      });
    });
  });
}

// What the backward passes make of one vector: d = x - mean, dz, and the norm's own gradient.
template <class A, class E, class R>
struct Slopes {
  int64_t channels;
  const E* x;
  const R *dy, *residual;

  explicit Slopes(const NormBackward& call)
      : channels(call.channels),
        x(static_cast<const E*>(call.x)),
        dy(static_cast<const R*>(call.grad)),
        residual(static_cast<const R*>(call.residual)) {}

  template <NormAct act, bool joined, class Part>
  void at(int64_t where, Part part, Vec<A> mean, Vec<A> scale, Vec<A> bias, A gain, Vec<A>& d, Vec<A>& dz) const {
    fetch_ahead(x + where, channels);
    fetch_ahead(dy + where, channels);
    d = load_lanes<A>(x + where, part) - mean;
    dz = load_lanes<A>(dy + where, part);
    if constexpr (act == NormAct::none) return;
    Vec<A> z = (d * scale + bias) * gain;
    if constexpr (joined) z += load_lanes<A>(residual + where, part);
    dz = slope<act>(dz, z);
  }
};

template <class A, class E, class R>
void backward_sums(const NormBackward& call, double* parts, int64_t begin, int64_t end) {
  const int64_t channels = call.channels, size = padded<A>(channels);
  const auto of = constants(call, static_cast<const A*>(call.mean), static_cast<const A*>(call.var));
  const Slopes<A, E, R> slopes(call);
  const Buffer<A> sums = allocate<A>(2 * size);
  with_act(call, [&](auto act, auto joined) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kNormRows;
      std::fill_n(sums.get(), 2 * size, A(0));
      A *db = sums.get(), *dw = db + size;
      by_fours(first, std::min(first + kNormRows, call.rows), [&](int64_t r, auto count) {
        const Gains<A> gains(call, r, count);
        for_channels<A>(channels, [&](int64_t c, auto part) {
          const Vec<A> mean = load(of.mean.get() + c), scale = load(of.scale.get() + c), bias = load(of.bias.get() + c);
          Vec<A> b{}, w{}, d, dz;
          for (int i = 0; i < count; ++i) {
            slopes.template at<act(), joined()>((r + i) * channels + c, part, mean, scale, bias, gains.of[i], d, dz);
            dz *= gains.of[i];
            b += dz;
            w += dz * d;
          }
          store(db + c, load(db + c) + b);
          store(dw + c, load(dw + c) + w);
        });
      });
      double* to = parts + chunk * 2 * channels;
      for (int64_t c = 0; c < channels; ++c) to[c] = db[c], to[channels + c] = dw[c];
    }
  });
}

template <class A>
void merge_gradients(const NormBackward& call, const double* parts) {
  const int64_t channels = call.channels;
  const auto of = constants(call, static_cast<const A*>(call.mean), static_cast<const A*>(call.var));
  const Buffer<double> db = zeros(channels), dw = zeros(channels);
  for (int64_t chunk = 0; chunk < call.chunks(); ++chunk)
    for (int64_t c = 0; c < channels; ++c) {
      db[c] += parts[chunk * 2 * channels + c];
      dw[c] += parts[(chunk * 2 + 1) * channels + c];
    }
  for (int64_t c = 0; c < channels; ++c) {
    static_cast<A*>(call.dbias)[c] = static_cast<A>(db[c]);
    static_cast<A*>(call.dweight)[c] = static_cast<A>(dw[c] * of.rstd[c]);
  }
}

template <class A, class E, class R>
void backward_apply(const NormBackward& call, int64_t begin, int64_t end) {
  const int64_t channels = call.channels, size = padded<A>(channels);
  const auto of = constants(call, static_cast<const A*>(call.mean), static_cast<const A*>(call.var));
  const Slopes<A, E, R> slopes(call);
  // dx = scale * (gain * dz - db / n - d * (rstd * dw / n))
  const Buffer<A> shift = allocate<A>(size), tilt = allocate<A>(size);
  std::fill_n(shift.get(), size, A(0));
  std::fill_n(tilt.get(), size, A(0));
  const A rows = static_cast<A>(call.rows);
  for (int64_t c = 0; c < channels; ++c) {
    shift[c] = static_cast<const A*>(call.dbias)[c] / rows;
    tilt[c] = of.rstd[c] * static_cast<const A*>(call.dweight)[c] / rows;
  }
  E* dx = static_cast<E*>(call.dx);
  R* dresidual = static_cast<R*>(call.dresidual);
  with_act(call, [&](auto act, auto joined) {
    by_fours(begin * kNormRows, std::min(end * kNormRows, call.rows), [&](int64_t r, auto count) {
      const Gains<A> gains(call, r, count);
      for_channels<A>(channels, [&](int64_t c, auto part) {
        const Vec<A> mean = load(of.mean.get() + c), scale = load(of.scale.get() + c), bias = load(of.bias.get() + c);
        const Vec<A> less = load(shift.get() + c), along = load(tilt.get() + c);
        Vec<A> d, dz;
        for (int i = 0; i < count; ++i) {
          const int64_t at = (r + i) * channels + c;
          slopes.template at<act(), joined()>(at, part, mean, scale, bias, gains.of[i], d, dz);
          if constexpr (joined()) store_lanes<A>(dresidual + at, dz, part);
          store_lanes<A>(dx + at, scale * (dz * gains.of[i] - less - d * along), part);
        }
      });
    });
  });
}

// f(accumulation type, x's type, residual's and y's type)
template <class F>
void with_types_of(const NormCall& call, F f) {
  with_types(call.dtype, [&](auto a, auto e) { call.wide ? f(a, e, a) : f(a, e, e); });
}

}  // namespace

void norm_stats(const NormForward& call, double* parts, int64_t begin, int64_t end) {
  with_types(call.dtype, [&](auto a, auto e) { stats<decltype(a), decltype(e)>(call, parts, begin, end); });
}
void norm_merge(const NormForward& call, const double* parts) {
  with_types(call.dtype, [&](auto a, auto) { merge_stats<decltype(a)>(call, parts); });
}
void norm_apply(const NormForward& call, int64_t begin, int64_t end) {
  with_types_of(call, [&](auto a, auto e, auto r) {
    apply<decltype(a), decltype(e), decltype(r)>(call, begin, end);
  });
}
void norm_backward_sums(const NormBackward& call, double* parts, int64_t begin, int64_t end) {
  with_types_of(call, [&](auto a, auto e, auto r) {
    backward_sums<decltype(a), decltype(e), decltype(r)>(call, parts, begin, end);
  });
}
void norm_backward_merge(const NormBackward& call, const double* parts) {
  with_types(call.dtype, [&](auto a, auto) { merge_gradients<decltype(a)>(call, parts); });
}
void norm_backward_apply(const NormBackward& call, int64_t begin, int64_t end) {
  with_types_of(call, [&](auto a, auto e, auto r) {
    backward_apply<decltype(a), decltype(e), decltype(r)>(call, begin, end);
  });
}

}  // namespace fer::cpu::FER_ISA
