// linear on the CPU: products of rows with a weight, in float32 vectors. Processors that multiply tiles of bfloat16
// take linear_tiles.cpp for what is no more than a product.
//
// Sums of a tile, kRows rows by two vectors of columns, stay in registers. What a tile multiplies is packed
// first: rows of the left side one after the other, a fixed pitch apart, so that one register addresses all of
// them; columns of the right side two vectors wide. Packing takes x and m side by side, and the columns of one
// group, from where they lie. Long sums are made in stretches of kDeep terms, which are added up in memory:
// that costs little, and rounds like the blocked sums of a matrix library.
//
// What comes before and after a product is done while its numbers are in the cache anyway: rows are normed and
// activated as they are packed, and statistics of results taken, or slopes multiplied in, a panel at a time.
// A batch norm's own statistics depend on all rows, so those of y are a result of their own, with a gradient
// of its own, which is added to y's as that is packed.
#include <algorithm>
#include <array>

#include "channels.h"
#include "kernels.h"
#include "product.h"

namespace fer::cpu::FER_ISA {
namespace {

constexpr int kLane = kLanes<float>, kWide = 2 * kLane;
constexpr int64_t kDeep = 192;              // terms of a stretch: with them, a tile's operands fit the innermost cache
constexpr int64_t kPitch = kDeep + 16;      // of packed rows: not a power of two, whose lines would share cache sets
constexpr int64_t kChunk = 8 * kRows;       // rows that a panel of a weight meets while it is in the cache
constexpr int64_t kBlock = 128;             // rows of a weight's gradient at once
constexpr int64_t kPanels = 12;             // panels of a weight's gradient at once
constexpr int64_t kPartRows = 784, kParts = 8;  // of a weight's gradient: most rows of a part, up to so many parts

// ---- columns of x and m, or of y ----

// `width` columns of one tensor, and as many of a second, where there is one.
template <class Float>
struct Columns {
  Float *x, *m;
  int64_t width, pitch;

  int64_t panels_of_one() const { return (width + kWide - 1) / kWide; }
  int64_t panels() const { return panels_of_one() * (m ? 2 : 1); }
  // Panel p's first column, and how many columns it has: no panel lies in both tensors.
  Float* panel(int64_t p, int* columns) const {
    const int64_t at = p % panels_of_one() * kWide;
    *columns = static_cast<int>(std::min<int64_t>(kWide, width - at));
    return (p < panels_of_one() ? x : m) + at;
  }
};

// Group g's columns of x and m, or their gradients, and of y or its gradient.
template <class Float>
Columns<Float> inputs(const LinearCall& call, Float* x, Float* m, int64_t g) {
  return {x + g * call.in, m ? m + g * call.in : nullptr, call.in, call.groups * call.in};
}
template <class Float>
Columns<Float> outputs(const LinearCall& call, Float* y, int64_t g) {
  return {y + g * call.out, nullptr, call.out, call.groups * call.out};
}

// Stretches of a sum of `terms`, and how long each is: about the same.
inline int64_t stretches(int64_t terms) { return (terms + kDeep - 1) / kDeep; }
inline int64_t stretch(int64_t terms) { return (terms + stretches(terms) - 1) / stretches(terms); }

// f(rows, columns), both as constants, for a tile of up to kRows rows and one or two vectors of columns.
template <class F>
inline void with_tile(int64_t rows, int columns, F f) {
  [&]<int... r>(std::integer_sequence<int, r...>) {
    const auto try_rows = [&](auto count) {
      if (count != rows) return false;
      columns > kLane ? f(count, std::integral_constant<int, 2>{}) : f(count, std::integral_constant<int, 1>{});
      return true;
    };
    (void)(try_rows(std::integral_constant<int, kRows - r>{}) || ...);  // full tiles are asked for first
  }(std::make_integer_sequence<int, kRows>{});
}

// ---- packing ----

// `to` has room for a whole last vector, here and wherever rows are packed: a store under a mask takes longer.
inline void copy_row(const float* from, int64_t count, float* to) {
  for_channels<float>(count, [&](int64_t c, auto part) { store(to + c, load_lanes<float>(from + c, part)); });
}

// A weight's panel for y, [input][output of the panel], or (transposed) for dx, [output][input of the panel].
// What stands in columns that a panel lacks is never looked at.
void pack_panel(const LinearCall& call, bool transposed, int64_t group, int64_t p, float* packed) {
  const int64_t width = call.in * call.sides, each = ((transposed ? call.in : call.out) + kWide - 1) / kWide;  // panels of one tensor
  const int64_t side = p / each, at = p % each * kWide;
  const int columns = static_cast<int>(std::min<int64_t>(kWide, (transposed ? call.in : call.out) - at));
  const float* weight = call.weight + group * call.out * width;
  if (transposed) {
    for (int64_t o = 0; o < call.out; ++o) {
      const float* row = weight + o * width + at * call.sides + side;
      if (call.sides == 1)
        copy_row(row, columns, packed + o * kWide);
      else
        for (int64_t c = 0; c < columns; ++c) packed[o * kWide + c] = row[2 * c];
    }
    return;
  }
  weight += at * width;
  const Buffer<float> apart = allocate<float>(call.sides == 1 ? 0 : columns * width);  // x's inputs first, then m's
  if (call.sides == 2) {
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t i = 0; i < call.in; ++i)
        for (int64_t s = 0; s < 2; ++s) apart[c * width + s * call.in + i] = weight[c * width + 2 * i + s];
    weight = apart.get();
  }
  const float* rows[kWide];
  float ones[kWide];
  std::fill_n(ones, kWide, 1.0f);
  point_at(weight, width, columns, kWide, rows);
  pack<float>(rows, ones, width, kWide, packed);
}

// ---- memory that is needed next ----

// Rows of a tensor, fetched a few lines at a time while tiles are multiplied: packing would wait for cold memory.
struct Ahead {
  const char* row = nullptr;
  int64_t pitch = 0, lines = 0, rows = 0, each = 0, line = 0;

  Ahead() = default;
  // `rows` rows of `width` numbers, within `times` calls of fetch().
  Ahead(const float* first, int64_t pitch, int64_t width, int64_t rows, int64_t times)
      : row(reinterpret_cast<const char*>(first)), pitch(4 * pitch), lines((width + 15) / 16), rows(width > 0 ? rows : 0) {
    each = (lines * rows + times - 1) / times;
  }
  void fetch() {
    for (int64_t i = 0; i < each && rows > 0; ++i) {
      __builtin_prefetch(row + 64 * line, 0, 2);
      if (++line == lines) line = 0, row += pitch, --rows;
    }
  }
};

// ---- rows, as a product takes them: copy(r, from, count, to) writes terms [from, from + count) of row r, and
// ahead(r, rows, from, count, times) is the memory that this reads for `rows` rows ----

struct Plain {
  Columns<const float> of;
  void copy(int64_t r, int64_t from, int64_t count, float* to) const {
    const int64_t of_x = std::clamp<int64_t>(of.width - from, 0, count);
    if (of_x) copy_row(of.x + r * of.pitch + from, of_x, to);
    if (of_x < count) copy_row(of.m + r * of.pitch + from + of_x - of.width, count - of_x, to + of_x);
  }
  std::array<Ahead, 2> ahead(int64_t r, int64_t rows, int64_t from, int64_t count, int64_t times) const {
    const int64_t of_x = std::clamp<int64_t>(of.width - from, 0, count);
    return {Ahead(of.x + r * of.pitch + from, of.pitch, of_x, rows, times),
            of.m ? Ahead(of.m + r * of.pitch + from + of_x - of.width, of.pitch, count - of_x, rows, times) : Ahead()};
  }
};

// A group's part of a channel's constants: norm = (x - mean) * scale + shift.
struct Constants {
  const float *mean, *scale, *shift;
};

template <NormAct act>
struct Normed {
  Columns<const float> of;
  Constants by;
  void copy(int64_t r, int64_t from, int64_t count, float* to) const {
    const float* row = of.x + r * of.pitch + from;
    for_channels<float>(count, [&](int64_t c, auto part) {
      const Vec<float> mean = load(by.mean + from + c), scale = load(by.scale + from + c), shift = load(by.shift + from + c);
      store(to + c, activate<act>((load_lanes<float>(row + c, part) - mean) * scale + shift));
    });
  }
  std::array<Ahead, 2> ahead(int64_t r, int64_t rows, int64_t from, int64_t count, int64_t times) const {
    return {Ahead(of.x + r * of.pitch + from, of.pitch, count, rows, times), {}};
  }
};

// y's gradient with what comes to it by way of y's statistics: dy + shift + scale * (y - mean).
struct Tilted {
  Columns<const float> grad;
  const float* y;
  Constants by;
  void copy(int64_t r, int64_t from, int64_t count, float* to) const {
    const float *dy = grad.x + r * grad.pitch + from, *row = y + r * grad.pitch + from;
    for_channels<float>(count, [&](int64_t c, auto part) {
      const Vec<float> mean = load(by.mean + from + c), scale = load(by.scale + from + c), shift = load(by.shift + from + c);
      const Vec<float> tilt = (load_lanes<float>(row + c, part) - mean) * scale + shift;
      store(to + c, load_lanes<float>(dy + c, part) + tilt);
    });
  }
  std::array<Ahead, 2> ahead(int64_t r, int64_t rows, int64_t from, int64_t count, int64_t times) const {
    const int64_t at = r * grad.pitch + from;
    return {Ahead(grad.x + at, grad.pitch, count, rows, times), Ahead(y + at, grad.pitch, count, rows, times)};
  }
};

// Rows [begin, end) of a left side, to [tile][stretch][row][kPitch].
template <class Rows>
void pack_rows(const Rows& rows, int64_t terms, int64_t begin, int64_t end, float* packed) {
  const int64_t step = stretch(terms), size = stretches(terms) * kRows * kPitch;
  for (int64_t r = begin; r < end; ++r) {
    float* row = packed + (r - begin) / kRows * size + (r - begin) % kRows * kPitch;
    for (int64_t from = 0; from < terms; from += step, row += kRows * kPitch)
      rows.copy(r, from, std::min(step, terms - from), row);
  }
}

// ---- products ----

// Rows [0, rows) of a chunk, packed, times a panel, plus `added`, to `columns` columns of `to`. `sums` is scratch.
// Meanwhile the memory of `next`, within panel_times() calls, is fetched.
int64_t panel_times(int64_t terms, int64_t rows) { return stretches(terms) * ((rows + kRows - 1) / kRows); }
void panel_product(const float* left, const float* panel, int64_t terms, int64_t rows, int columns, const float* added,
                   float* to, int64_t pitch, float* sums, Ahead (&next)[3]) {
  const int64_t step = stretch(terms), size = stretches(terms) * kRows * kPitch;
  for (int64_t from = 0; from < terms; from += step)
    for (int64_t r = 0; r < rows; r += kRows) {
      for (Ahead& memory : next) memory.fetch();
      with_tile(std::min<int64_t>(kRows, rows - r), columns, [&](auto height, auto vectors) {
        float *so_far = sums + r * kWide, *row = to + r * pitch;
        const auto product = [&](auto done) {
          product_tile<float, height(), vectors(), kPitch, 1>(
              left + r / kRows * size + from / step * kRows * kPitch, panel + from * kWide, kWide,
              std::min(step, terms - from), nullptr, done);
        };
        const auto keep = [&](int i, int v, Vec<float> sum) {
          float* at = so_far + i * kWide + v * kLane;
          store(at, from == 0 ? sum : load(at) + sum);
        };
        if (from + step < terms) return product(keep);
        product([&](int i, int v, Vec<float> sum) {
          sum += load(added + v * kLane);
          if (from != 0) sum += load(so_far + i * kWide + v * kLane);
          float* at = row + i * pitch + v * kLane;
          const int left_over = columns - v * kLane;
          left_over >= kLane ? store_lanes<float>(at, sum, Whole{}) : store_lanes<float>(at, sum, left_over);
        });
      });
    }
}

// Rows [begin, end) of out(g) = in(g), of `terms` terms, times group g's packed weight, plus start(g), a number for
// each column or null. finish(g, p, first, last) when rows [first, last) of panel p are there; it reads
// finish_reads(g, p, first, rows, times).
template <class In, class Out, class Start, class Reads, class Finish>
void rows_product(int64_t groups, int64_t terms, In in, Out out, Start start, Reads finish_reads, Finish finish,
                  const float* packed, int64_t begin, int64_t end) {
  const int64_t panels = out(0).panels();
  const Buffer<float> left = allocate<float>(kChunk * stretches(terms) * kPitch), sums = allocate<float>(kChunk * kWide);
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t last = std::min(end, first + kChunk);
    for (int64_t g = 0; g < groups; ++g) {
      pack_rows(in(g), terms, first, last, left.get());
      const auto to = out(g);
      const int64_t times = panel_times(terms, last - first);
      const bool same = g + 1 < groups;  // rows come next
      const int64_t later = same ? first : last, rows = (same ? last : std::min(end, last + kChunk)) - later;
      const auto inputs_ahead = in(same ? g + 1 : 0).ahead(later, rows, 0, terms, times * panels);
      Ahead next[3] = {inputs_ahead[0], inputs_ahead[1], {}};
      for (int64_t p = 0; p < panels; ++p) {
        int columns;
        float* column = to.panel(p, &columns);
        alignas(64) float added[kWide] = {};
        if (const float* numbers = start(g)) std::copy_n(numbers + p * kWide, columns, added);
        next[2] = finish_reads(g, p, first, last - first, times);
        panel_product(left.get(), packed + (g * panels + p) * terms * kWide, terms, last - first, columns, added,
                      column + first * to.pitch, to.pitch, sums.get(), next);
        finish(g, p, first, last);
      }
    }
  }
}

Ahead nothing(int64_t, int64_t, int64_t, int64_t, int64_t) { return {}; }

// ---- the weight's gradient ----

// Tiles of `count` results, of nearly the same height.
inline int64_t tiles_of(int64_t count) { return (count + kRows - 1) / kRows; }
inline int64_t tile_begin(int64_t count, int64_t t) { return t * count / tiles_of(count); }

// A tile of `height` results by a panel's `columns`, over packed rows, added to what is there.
void add_product(const float* left, const float* right, int64_t rows, int64_t height, int columns, float* to, int64_t pitch) {
  for (int64_t i = 0; i < height; ++i)
    for (int v = 0; v < kWide; v += 16) __builtin_prefetch(to + i * pitch + v, 1, 3);
  with_tile(height, columns, [&](auto height, auto vectors) {
    product_tile<float, height(), vectors(), 1, kPackedRows>(left, right, kWide, rows, nullptr,
                                                             [&](int i, int v, Vec<float> sum) {
                                                               float* at = to + i * pitch + v * kLane;
                                                               store(at, load(at) + sum);
                                                             });
  });
}

// gradᵀ x over rows [begin, end), for panels [from, to) of x's columns, added to sum (outputs, panels).
template <class X, class Grad>
void weight_part(const X& x, const Columns<const float>& columns, const Grad& grad, int64_t out, int64_t begin, int64_t end,
                 int64_t from, int64_t to, float* sum) {
  // Blocks of a panel and of a tile; the lines beyond keep those of the next from sharing cache sets.
  constexpr int64_t kPanel = kBlock * kWide + 32, kTile = kBlock * kPackedRows + 16;
  const int64_t tiles = tiles_of(out), pitch = columns.panels() * kWide;
  const Buffer<float> left = allocate<float>(tiles * kTile), right = allocate<float>((to - from) * kPanel);
  for (int64_t o = 0; o < out; ++o) std::fill_n(sum + o * pitch + from * kWide, (to - from) * kWide, 0.0f);
  const auto width = [&](int64_t p) {
    int count;
    columns.panel(p, &count);
    return count;
  };
  const auto term = [&](int64_t p) {
    return p / columns.panels_of_one() * columns.width + p % columns.panels_of_one() * kWide;
  };
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t rows = std::min(kBlock, end - first);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t p = from; p < to; ++p)
        x.copy(first + r, term(p), width(p), right.get() + (p - from) * kPanel + r * kWide);
      for (int64_t t = 0; t < tiles; ++t)
        grad.copy(first + r, tile_begin(out, t), tile_begin(out, t + 1) - tile_begin(out, t),
                  left.get() + t * kTile + r * kPackedRows);
    }
    const int64_t later = std::min(end, first + kBlock), next = std::min(end, later + kBlock) - later;
    const int64_t first_term = term(from), terms = term(to - 1) + width(to - 1) - first_term;
    auto of_x = x.ahead(later, next, first_term, terms, (to - from) * tiles);
    auto of_grad = grad.ahead(later, next, 0, out, (to - from) * tiles);
    for (int64_t p = from; p < to; ++p)
      for (int64_t t = 0; t < tiles; ++t) {
        for (auto* memory : {&of_x[0], &of_x[1], &of_grad[0], &of_grad[1]}) memory->fetch();
        const int64_t at = tile_begin(out, t);
        add_product(left.get() + t * kTile, right.get() + (p - from) * kPanel, rows, tile_begin(out, t + 1) - at, width(p),
                    sum + at * pitch + p * kWide, pitch);
      }
  }
}

// ---- constants, and sums over rows ----

struct AllConstants {
  Buffer<float> mean, scale, shift;
  explicit AllConstants(int64_t channels)  // and a vector beyond the last
      : mean(allocate<float>(channels + kLane)), scale(allocate<float>(channels + kLane)), shift(allocate<float>(channels + kLane)) {
    for (const auto* of : {&mean, &scale, &shift}) std::fill_n(of->get(), channels + kLane, 0.0f);
  }
  Constants of(int64_t channel) const { return {mean.get() + channel, scale.get() + channel, shift.get() + channel}; }
};

float reciprocal_deviation(const LinearCall& call, int64_t c) { return 1 / std::sqrt(call.var[c] + static_cast<float>(call.eps)); }

AllConstants norm_of_x(const LinearCall& call) {
  const int64_t channels = call.mean ? call.groups * call.in : 0;
  AllConstants all(channels);
  for (int64_t c = 0; c < channels; ++c) {
    all.mean[c] = call.mean[c];
    all.scale[c] = reciprocal_deviation(call, c) * (call.scale ? call.scale[c] : 1);
    all.shift[c] = call.shift ? call.shift[c] : 0;
  }
  return all;
}

AllConstants tilt_of_y(const LinearBackward& call) {
  const int64_t channels = call.y ? call.groups * call.out : 0;
  AllConstants all(channels);
  const float rows = static_cast<float>(call.rows);
  for (int64_t c = 0; c < channels; ++c) {
    all.mean[c] = call.y_mean[c];
    all.scale[c] = 2 * call.dy_var[c] / rows;
    all.shift[c] = call.dy_mean[c] / rows;
  }
  return all;
}

// f(rows of x) and f(rows of dy), whatever they are made of.
template <class F>
void with_x(const LinearCall& call, const AllConstants& norm, F f) {
  const auto normed = [&](auto act) {
    f([&](int64_t g) { return Normed<act()>{inputs(call, call.x, call.m, g), norm.of(g * call.in)}; });
  };
  if (!call.mean) return f([&](int64_t g) { return Plain{inputs(call, call.x, call.m, g)}; });
  switch (call.act) {
    case NormAct::none: return normed(std::integral_constant<NormAct, NormAct::none>{});
    case NormAct::relu: return normed(std::integral_constant<NormAct, NormAct::relu>{});
    case NormAct::gelu: return normed(std::integral_constant<NormAct, NormAct::gelu>{});
  }
}
template <class F>
void with_grad(const LinearBackward& call, const AllConstants& tilt, F f) {
  if (call.y)
    f([&](int64_t g) { return Tilted{outputs(call, call.grad, g), call.y + g * call.out, tilt.of(g * call.out)}; });
  else
    f([&](int64_t g) { return Plain{outputs(call, call.grad, g)}; });
}

// A chunk's mean and squared differences from it, of channels [c, c + columns): as norm.cpp takes them, as
// differences from the mean of its first rows.
void part_of_stats(const LinearForward& call, int64_t c, int columns, int64_t first, int64_t last) {
  const int64_t channels = call.groups * call.out, few = std::min<int64_t>(8, last - first);
  double* to = call.parts + first / kChunk * 2 * channels + c;
  for_channels<float>(columns, [&](int64_t at, auto part) {
    const float* y = call.y + first * channels + c + at;
    Vec<float> centre{}, sum{}, square{};
    for (int64_t r = 0; r < few; ++r) centre += load_lanes<float>(y + r * channels, part);
    centre /= splat(static_cast<float>(few));
    for (int64_t r = 0; r < last - first; ++r) {
      const Vec<float> d = load_lanes<float>(y + r * channels, part) - centre;
      sum += d;
      square += d * d;
    }
    for (int l = 0; l < std::min<int64_t>(kLane, columns - at); ++l) {
      const double mean = static_cast<double>(sum[l]) / static_cast<double>(last - first);
      to[at + l] = centre[l] + mean;
      to[channels + at + l] = std::max(square[l] - sum[l] * mean, 0.0);  // a NaN stays
    }
  });
}

// What is the gradient of the normed and activated x becomes that of x alone, mean and variance apart; and the
// chunk's sums of the norm's gradient, and of that times x - mean.
template <NormAct act>
void part_of_slopes(const LinearBackward& call, const Constants& by, int64_t c, int columns, int64_t first, int64_t last) {
  const int64_t channels = call.groups * call.in;
  double* to = call.parts + first / kChunk * 2 * channels + c;
  for_channels<float>(columns, [&](int64_t at, auto part) {
    const float* x = call.x + first * channels + c + at;
    float* dx = call.dx + first * channels + c + at;
    const Vec<float> mean = load(by.mean + at), scale = load(by.scale + at), shift = load(by.shift + at);
    Vec<float> sum{}, along{};
    for (int64_t r = 0; r < last - first; ++r) {
      const Vec<float> d = load_lanes<float>(x + r * channels, part) - mean;
      const Vec<float> slope_here = slope<act>(load_lanes<float>(dx + r * channels, part), d * scale + shift);
      sum += slope_here;
      along += slope_here * d;
      store_lanes<float>(dx + r * channels, slope_here * scale, part);
    }
    for (int l = 0; l < std::min<int64_t>(kLane, columns - at); ++l) to[at + l] = sum[l], to[channels + at + l] = along[l];
  });
}

// Rows of a part of dweight: by the shape alone, so that sums have one order however many threads there are.
int64_t part_rows(const LinearCall& call) {
  const int64_t parts = std::clamp<int64_t>((call.rows + kPartRows - 1) / kPartRows, 1, kParts);
  return std::max<int64_t>(1, (call.rows + parts - 1) / parts);
}
int64_t panels_of(const LinearCall& call, bool transposed) {
  return transposed ? (call.in + kWide - 1) / kWide * call.sides : (call.out + kWide - 1) / kWide;
}
int64_t panel_size(const LinearCall& call, bool transposed) {
  return (transposed ? call.out : call.in * call.sides) * kWide;
}

}  // namespace

int64_t linear_units(const LinearCall& call, bool transposed) { return call.groups * panels_of(call, transposed); }
int64_t linear_packed(const LinearCall& call, bool transposed) {
  return linear_units(call, transposed) * panel_size(call, transposed) * static_cast<int64_t>(sizeof(float));
}
void linear_pack(const LinearCall& call, bool transposed, void* packed, int64_t begin, int64_t end) {
  const int64_t panels = panels_of(call, transposed);
  for (int64_t u = begin; u < end; ++u)
    pack_panel(call, transposed, u / panels, u % panels, static_cast<float*>(packed) + u * panel_size(call, transposed));
}

int64_t linear_chunk() { return kChunk; }

void linear(const LinearForward& call, const void* packed, int64_t begin, int64_t end) {
  const AllConstants norm = norm_of_x(call);
  with_x(call, norm, [&](auto x) {
    rows_product(
        call.groups, call.in * call.sides, x, [&](int64_t g) { return outputs(call, call.y, g); },
        [&](int64_t g) { return call.bias ? call.bias + g * call.out : nullptr; }, nothing,
        [&](int64_t g, int64_t p, int64_t first, int64_t last) {
          const int columns = static_cast<int>(std::min<int64_t>(kWide, call.out - p * kWide));
          if (call.y_mean) part_of_stats(call, g * call.out + p * kWide, columns, first, last);
        },
        static_cast<const float*>(packed), begin, end);
  });
}

void linear_merge_stats(const LinearForward& call) {
  merge_stats(call.rows, kChunk, call.groups * call.out, call.parts, call.y_mean, call.y_var);
}

void linear_input_gradient(const LinearBackward& call, const void* packed, int64_t begin, int64_t end) {
  const AllConstants norm = norm_of_x(call), tilt = tilt_of_y(call);
  with_grad(call, tilt, [&](auto grad) {
    const auto run = [&](auto reads, auto finish) {
      rows_product(
          call.groups, call.out, grad, [&](int64_t g) { return inputs(call, call.dx, call.dm, g); },
          [](int64_t) { return static_cast<const float*>(nullptr); }, reads, finish, static_cast<const float*>(packed), begin, end);
    };
    const auto with = [&](auto act) {
      const auto reads = [&](int64_t g, int64_t p, int64_t first, int64_t rows, int64_t times) {
        const int64_t channels = call.groups * call.in, columns = std::min<int64_t>(kWide, call.in - p * kWide);
        return Ahead(call.x + first * channels + g * call.in + p * kWide, channels, columns, rows, times);
      };
      run(reads, [&](int64_t g, int64_t p, int64_t first, int64_t last) {
        const int64_t c = g * call.in + p * kWide;
        part_of_slopes<act()>(call, norm.of(c), c, static_cast<int>(std::min<int64_t>(kWide, call.in - p * kWide)), first, last);
      });
    };
    if (!call.mean) return run(nothing, [](int64_t, int64_t, int64_t, int64_t) {});
    switch (call.act) {
      case NormAct::none: return with(std::integral_constant<NormAct, NormAct::none>{});
      case NormAct::relu: return with(std::integral_constant<NormAct, NormAct::relu>{});
      case NormAct::gelu: return with(std::integral_constant<NormAct, NormAct::gelu>{});
    }
  });
}

void linear_merge_gradients(const LinearBackward& call) {
  const int64_t channels = call.groups * call.in, chunks = (call.rows + kChunk - 1) / kChunk;
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0, along = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      sum += call.parts[chunk * 2 * channels + c];
      along += call.parts[(chunk * 2 + 1) * channels + c];
    }
    const double rstd = reciprocal_deviation(call, c), scale = call.scale ? call.scale[c] : 1;
    call.dshift[c] = static_cast<float>(sum);
    call.dscale[c] = static_cast<float>(along * rstd);
    call.dmean[c] = static_cast<float>(-sum * rstd * scale);
    call.dvar[c] = static_cast<float>(-0.5 * along * rstd * rstd * rstd * scale);
  }
}

int64_t linear_parts(const LinearCall& call) { return call.groups * ((call.rows + part_rows(call) - 1) / part_rows(call)); }
int64_t linear_part_size(const LinearCall& call) { return call.out * panels_of(call, true) * kWide; }
int64_t linear_part_units(const LinearCall& call) { return (panels_of(call, true) + kPanels - 1) / kPanels; }

void linear_weight_parts(const LinearBackward& call, float* parts, int64_t begin, int64_t end) {
  const AllConstants norm = norm_of_x(call), tilt = tilt_of_y(call);
  const int64_t units = linear_part_units(call), panels = panels_of(call, true);
  with_x(call, norm, [&](auto x) {
    with_grad(call, tilt, [&](auto grad) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t part = unit / units, g = part % call.groups, row = part / call.groups * part_rows(call);
        weight_part(x(g), inputs(call, call.x, call.m, g), grad(g), call.out, row, std::min(call.rows, row + part_rows(call)),
                    unit % units * panels / units, (unit % units + 1) * panels / units, parts + part * linear_part_size(call));
      }
    });
  });
}

void linear_weight_merge(const LinearBackward& call, const float* parts, int64_t begin, int64_t end) {
  const int64_t pitch = panels_of(call, true) * kWide, half = pitch / call.sides, count = linear_parts(call);
  const Buffer<float> sum = allocate<float>(pitch);
  for (int64_t row = begin; row < end; ++row) {
    std::fill_n(sum.get(), pitch, 0.0f);
    for (int64_t i = row / call.out; i < count; i += call.groups) {
      const float* part = parts + i * linear_part_size(call) + row % call.out * pitch;
      for (int64_t c = 0; c < pitch; ++c) sum[c] += part[c];
    }
    float* to = call.dweight + row * call.in * call.sides;
    for (int64_t c = 0; c < call.in; ++c)
      call.sides == 2 ? (to[2 * c] = sum[c], to[2 * c + 1] = sum[half + c]) : to[c] = sum[c];
  }
}

}  // namespace fer::cpu::FER_ISA
