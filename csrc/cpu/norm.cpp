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

#include "channels.h"

namespace fer::cpu::FER_ISA {
namespace {

// A pass over four rows at once is many short streams, which the processor does not foresee.
template <class E>
inline void fetch_ahead(const E* rows, int64_t channels) {
  __builtin_prefetch(rows + 4 * channels);
}

// f(act, joined) with the call's activation, and whether there is a residual, as constants.
template <class F>
inline void with_act(const NormCall& call, F f) {
  with_activation(call.act, [&](auto act) { call.residual ? f(act, std::true_type{}) : f(act, std::false_type{}); });
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
          store_lanes<A>(y + at, activate<act(), R>(z), part);
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
    dz = slope<act, R>(dz, z);
  }
};

// `given`: the statistics are not x's own, or have a gradient of their own; then this pass makes dx as well.
template <class A, class E, class R, bool given>
void backward_sums(const NormBackward& call, double* parts, int64_t begin, int64_t end) {
  const int64_t channels = call.channels, size = padded<A>(channels);
  E* dx = static_cast<E*>(call.dx);
  R* dresidual = static_cast<R*>(call.dresidual);
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
            const int64_t at = (r + i) * channels + c;
            slopes.template at<act(), joined()>(at, part, mean, scale, bias, gains.of[i], d, dz);
            if constexpr (given && joined()) store_lanes<A>(dresidual + at, dz, part);
            dz *= gains.of[i];
            b += dz;
            w += dz * d;
            if constexpr (given) store_lanes<A>(dx + at, scale * dz, part);
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
    if (!call.dmean) continue;
    static_cast<A*>(call.dmean)[c] = static_cast<A>(-db[c] * of.scale[c]);
    static_cast<A*>(call.dvar)[c] = static_cast<A>(-0.5 * dw[c] * of.rstd[c] * of.rstd[c] * of.scale[c]);
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
  with_types(call.dtype, [&](auto a, auto) {
    merge_stats(call.rows, kNormRows, call.channels, parts, static_cast<decltype(a)*>(call.mean), static_cast<decltype(a)*>(call.var));
  });
}
void norm_apply(const NormForward& call, int64_t begin, int64_t end) {
  with_types_of(call, [&](auto a, auto e, auto r) {
    apply<decltype(a), decltype(e), decltype(r)>(call, begin, end);
  });
}
void norm_backward_sums(const NormBackward& call, double* parts, int64_t begin, int64_t end) {
  with_types_of(call, [&](auto a, auto e, auto r) {
    call.dmean ? backward_sums<decltype(a), decltype(e), decltype(r), true>(call, parts, begin, end)
               : backward_sums<decltype(a), decltype(e), decltype(r), false>(call, parts, begin, end);
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
