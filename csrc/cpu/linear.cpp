// linear and conv on the CPU: products of rows, or of windows of a map, with a weight, in vectors. Rows are float32, or
// compiled for AVX512_BF16 they are bfloat16; the rest is float32 always. Processors that multiply tiles of bfloat16
// take linear_tiles.cpp for what is no more than a product of rows.
//
// What is multiplied consists of words of 32 bits: a float32 number, or two bfloat16 ones, of terms that follow each
// other, whose products one instruction adds up. So everything below counts words but for packing, which makes them.
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
#include <numeric>

#include "channels.h"
#include "kernels.h"
#include "product.h"

namespace fer::cpu::FER_ISA {
namespace {

#if defined(__AVX512BF16__)
using Element = BFloat16;
#else
using Element = float;
#endif
constexpr bool kPairs = sizeof(Element) < sizeof(float);
constexpr int64_t kTerms = kPairs ? 2 : 1;  // of a word

constexpr int kLane = kLanes<float>, kWide = 2 * kLane;
constexpr int64_t kDeep = 192;              // words of a stretch: with them, a tile's operands fit the innermost cache
constexpr int64_t kPitch = kDeep + 16;      // of packed rows: not a power of two, whose lines would share cache sets
constexpr int64_t kChunk = 8 * kRows;       // rows that a panel of a weight meets while it is in the cache
constexpr int64_t kPackRows = 16;           // rows packed at once, a vector of columns after the other
constexpr int64_t kBlock = 200;             // words of rows of a weight's gradient at once: as kDeep
constexpr int64_t kPanels = 12, kTiles = 18;    // panels and tiles of a weight's gradient at once: as much as L2 holds
constexpr int64_t kPartRows = 784, kParts = 8;  // of a weight's gradient: most rows of a part, up to so many parts

// ---- columns of x and m, or of y's gradient ----

// `width` columns of one tensor, and as many of a second, where there is one.
struct Columns {
  const Element *x, *m;
  int64_t width, pitch;
};

inline const Element* elements(const void* of) { return static_cast<const Element*>(of); }
inline Element* elements(void* of) { return static_cast<Element*>(of); }

// Group g's columns of x and m, and of y's gradient; of windows, the map's.
inline Columns columns_of(const Windows& map, const void* x) { return {elements(x), nullptr, map.channels, map.channels}; }
inline Columns inputs(const LinearCall& call, int64_t g) {
  if (call.windows) return columns_of(call.windows, call.x);
  return {elements(call.x) + g * call.in, call.m ? elements(call.m) + g * call.in : nullptr, call.in, call.groups * call.in};
}
inline Columns outputs(const LinearBackward& call, int64_t g) {
  if (call.grad_windows) return columns_of(call.grad_windows, call.grad);
  return {elements(call.grad) + g * call.out, nullptr, call.out, call.groups * call.out};
}

inline int64_t words_of(int64_t terms) { return (terms + kTerms - 1) / kTerms; }

// Stretches of a sum of `words`, and how long each is: about the same.
inline int64_t stretches(int64_t words) { return (words + kDeep - 1) / kDeep; }
inline int64_t stretch(int64_t words) { return (words + stretches(words) - 1) / stretches(words); }

inline int64_t tiles_of(int64_t rows) { return (rows + kRows - 1) / kRows; }

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

#if defined(__AVX512BF16__)
// Words of two lanes each, and what a number becomes by being stored.
inline Vec<float> pairs(Vec<float> first, Vec<float> second) {
  const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i high = _mm512_slli_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(16)), 16);
  return reinterpret_cast<Vec<float>>(_mm512_permutexvar_epi16(_mm512_or_si512(low, high), both));
}
inline Vec<float> stored(Vec<float> v) { return widen_all(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v))); }

// v rounded up or down to bfloat16, in the share of rows that makes their mean right: of what is less than half a unit
// in the last place of what it is added to, rounding to the nearest would leave nothing in any row.
inline Vec<float> spread(Vec<float> v, int64_t row, int64_t column) {
  constexpr uint32_t kOfRow = 40503, kOfColumn = 25717;  // odd, so that all 2^16 shares come in turn
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const uint32_t first = static_cast<uint32_t>(row) * kOfRow + static_cast<uint32_t>(column) * kOfColumn;
  const __m512i share = _mm512_and_si512(_mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(first)),
                                                          _mm512_mullo_epi32(lanes, _mm512_set1_epi32(kOfColumn))),
                                         _mm512_set1_epi32(0xFFFF));
  const __m512i sum = _mm512_add_epi32(reinterpret_cast<__m512i>(v), share);
  const Vec<float> moved = reinterpret_cast<Vec<float>>(_mm512_andnot_si512(_mm512_set1_epi32(0xFFFF), sum));
  return v == v ? moved : v;
}
#else
inline Vec<float> stored(Vec<float> v) { return v; }
inline Vec<float> spread(Vec<float> v, int64_t, int64_t) { return v; }
#endif

// Where the terms of a word come from: a row, or (across) the same column of rows that follow each other.
enum class Words { along, across };
template <Words words>
using Packed = std::conditional_t<words == Words::along, Element, float>;

// `rows` rows of `count` columns to words, their rows `pitch` apart: from(c) has what belongs to columns from c on,
// and from(c)(r, part) makes those of row r. There is room for a whole last vector of a row: a store under a mask
// takes longer. Across, a last row without a second is paired with zeros.
template <Words words, class From>
inline void pack_block(int64_t rows, int64_t count, Packed<words>* to, int64_t pitch, From from) {
  for_channels<float>(count, [&](int64_t c, auto part) {
    const auto row = from(c);
    if constexpr (words == Words::along || !kPairs) {
      for (int64_t r = 0; r < rows; ++r) store_lanes<float>(to + r * pitch + c, row(r, part), Whole{});
    } else {
      int64_t r = 0;
      for (; r + 2 <= rows; r += 2) store(to + r / 2 * pitch + c, pairs(row(r, part), row(r + 1, part)));
      if (r < rows) store(to + r / 2 * pitch + c, pairs(row(r, part), Vec<float>{}));
    }
  });
}
// Likewise pairs the last term along a row of `terms`.
inline void end_row(Element* row, int64_t terms) {
  const Element zero{};
  if (kPairs && terms % 2) std::memcpy(row + terms, &zero, sizeof zero);
}
template <Words words, class T>
inline void copy_block(const T* from, int64_t from_pitch, int64_t rows, int64_t count, Packed<words>* to, int64_t pitch) {
  pack_block<words>(rows, count, to, pitch, [&](int64_t c) {
    return [=](int64_t r, auto part) { return load_lanes<float>(from + r * from_pitch + c, part); };
  });
}

// Numbers 0, 2, 4, ... from here on, as many as a vector has or `part` says; and no number beyond is looked at.
inline Vec<float> every_second(const float* from, Whole) {
  return [&]<int... l>(std::integer_sequence<int, l...>) {
    return __builtin_shufflevector(load(from), load(from + kLane - 1), (l < kLane / 2 ? 2 * l : 2 * l + 1)...);
  }(std::make_integer_sequence<int, kLane>{});
}
inline Vec<float> every_second(const float* from, int part) {
  Vec<float> found = {};
  for (int l = 0; l < part; ++l) found[l] = from[2 * l];
  return found;
}

// Words [0, count) of `rows` rows, `pitch` apart, to packed[word][row], kWide rows.
void transpose(const float* first, int64_t pitch, int rows, int64_t count, float* packed) {
  const float* row[kWide];
  point_at(first, pitch, rows, kWide, row);
  int64_t w = 0;
  for (; w + kLane <= count; w += kLane)
    for (int r = 0; r < kWide; r += 4)
      store_transposed<float>(load(row[r] + w), load(row[r + 1] + w), load(row[r + 2] + w), load(row[r + 3] + w), kWide,
                              packed + w * kWide + r);
  for (; w < count; ++w)
    for (int r = 0; r < kWide; ++r) std::memcpy(packed + w * kWide + r, row[r] + w, sizeof(float));
}

// A weight's panels: of all inputs and kWide outputs, for y, or (transposed) of all outputs and kWide inputs of x or
// of m, for dx and dm.
struct Panel {
  int64_t side, at;  // whose inputs, if it is for dx; the first
  int columns;
  static int64_t of_a_side(const LinearCall& call, bool transposed) {
    return ((transposed ? call.in : call.out) + kWide - 1) / kWide;
  }
  static int64_t all(const LinearCall& call, bool transposed) {
    return of_a_side(call, transposed) * (transposed ? call.sides : 1);
  }
  Panel(const LinearCall& call, bool transposed, int64_t p)
      : side(p / of_a_side(call, transposed)),
        at(p % of_a_side(call, transposed) * kWide),
        columns(static_cast<int>(std::min<int64_t>(kWide, (transposed ? call.in : call.out) - at))) {}
};

// A panel, [word of its terms][column]. What stands in columns that it lacks is never looked at.
void pack_panel(const LinearCall& call, bool transposed, int64_t group, int64_t p, float* packed) {
  const int64_t width = call.in * call.sides, words = words_of(width);
  const Panel panel(call, transposed, p);
  const float* weight = call.weight + group * call.out * width;
  if (transposed) {
    weight += panel.at * call.sides + panel.side;
    for (int64_t o = 0; o < call.out; o += kTerms, weight += kTerms * width, packed += kWide) {
      const int64_t terms = std::min(kTerms, call.out - o);
      if (call.sides == 1)
        copy_block<Words::across>(weight, width, terms, panel.columns, packed, 0);
      else
        pack_block<Words::across>(terms, panel.columns, packed, 0, [&](int64_t c) {
          return [=](int64_t r, auto part) { return every_second(weight + r * width + 2 * c, part); };
        });
    }
    return;
  }
  weight += panel.at * width;
  if (!kPairs && call.sides == 1) return transpose(weight, width, panel.columns, width, packed);
  const int64_t pitch = words + kLane;
  const Buffer<Element> rows = allocate<Element>(panel.columns * pitch * kTerms);  // x's inputs first, then m's
  for (int64_t c = 0; c < panel.columns; ++c, weight += width) {
    Element* const row = rows.get() + c * pitch * kTerms;
    if (call.sides == 1)
      copy_block<Words::along>(weight, 0, 1, width, row, 0);
    else
      for (int64_t side = 0; side < 2; ++side)
        pack_block<Words::along>(1, call.in, row + side * call.in, 0, [&](int64_t i) {
          return [=](int64_t, auto part) { return every_second(weight + side + 2 * i, part); };
        });
    end_row(row, width);
  }
  transpose(reinterpret_cast<const float*>(rows.get()), pitch, panel.columns, words, packed);
}

// ---- memory that is needed next ----

// Rows of a tensor, fetched a few at a time while tiles are multiplied: packing would wait for cold memory. What
// is fetched has to take few instructions, or the tile that follows waits for those.
struct Ahead {
  const char* row = nullptr;
  int64_t pitch = 0, bytes = 0, rows = 0, each = 0;
  int64_t left = INT64_MAX, line = 0, gap = 0;  // rows until there is a gap, and then until the next

  static constexpr int64_t kPiece = 64;
  Ahead() = default;
  // `rows` rows of `width` numbers, within `times` calls of fetch().
  Ahead(const Element* first, int64_t pitch, int64_t width, int64_t rows, int64_t times)
      : row(reinterpret_cast<const char*>(first)),
        pitch(pitch * static_cast<int64_t>(sizeof(Element))),
        bytes(width * static_cast<int64_t>(sizeof(Element))),
        rows(rows),
        each(0) {
    if (this->pitch == this->bytes && bytes < kPiece) {  // rows of one piece of memory share lines
      this->rows = (rows * bytes + kPiece - 1) / kPiece;
      this->pitch = this->bytes = kPiece;
    }
    each = (this->rows + times - 1) / times;
  }
  void fetch() {
    lines([](const char* line) { __builtin_prefetch(line, 0, 2); });
  }
  // Of rows that are to be written: a store waits for memory too.
  void claim() {
    lines([](const char* line) {
#if defined(__AVX2__)  // else the compiler takes a prefetch for reading
      asm volatile("prefetchw %0" ::"m"(*line));
#else
      __builtin_prefetch(line, 1);
#endif
    });
  }
  template <class F>
  void lines(F f) {
    for (int64_t now = std::min(each, rows); now > 0;) {
      const int64_t some = std::min(now, left);
      for (int64_t i = 0; i < some; ++i, row += pitch)
        for (int64_t b = 0; b < bytes; b += 64) f(row + b);
      now -= some, rows -= some, left -= some;
      if (left == 0) row += gap, left = line;
    }
  }
};

// ---- rows, as a product takes them: pack<words>(r, rows, from, count, to, pitch) writes columns [from, from + count)
// of `rows` rows from r on, of those that enter(first, last) announced, and ahead(r, rows, from, count, times) is the
// memory that this reads ----

struct Plain {
  Columns of;
  void enter(int64_t, int64_t) const {}
  template <Words words>
  void pack(int64_t r, int64_t rows, int64_t from, int64_t count, Packed<words>* to, int64_t pitch) const {
    constexpr int64_t merged = words == Words::across ? kTerms : 1;  // rows in one
    const int64_t of_x = std::clamp<int64_t>(of.width - from, 0, count), of_m = count - of_x, at = r * of.pitch + from;
    // m's last vector may reach into the next row, and then has to be there before that row is.
    const int64_t most = of_x && of_x + (of_m + kLane - 1) / kLane * kLane > pitch ? merged : rows;
    for (int64_t row = 0; row < rows; row += most) {
      const int64_t each = std::min(most, rows - row);
      Packed<words>* const here = to + row / merged * pitch;
      if (of_x) copy_block<words>(of.x + at + row * of.pitch, of.pitch, each, of_x, here, pitch);
      if (of_m) copy_block<words>(of.m + at + row * of.pitch + of_x - of.width, of.pitch, each, of_m, here + of_x, pitch);
    }
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
  auto from(int64_t c) const {
    return [mean = load(mean + c), scale = load(scale + c), shift = load(shift + c)](Vec<float> x) {
      return (x - mean) * scale + shift;
    };
  }
};

template <NormAct act>
struct Normed {
  Columns of;
  Constants by;
  // From this pixel of a map on, with so many pixels a row.
  Normed from_pixel(int64_t pixel, int64_t channels, int64_t each) const {
    return {{of.x + pixel * channels, nullptr, each * channels, each * channels}, by};
  }
  void enter(int64_t, int64_t) const {}
  template <Words words>
  void pack(int64_t r, int64_t rows, int64_t from, int64_t count, Packed<words>* to, int64_t pitch) const {
    const Element* x = of.x + r * of.pitch + from;
    pack_block<words>(rows, count, to, pitch, [&](int64_t c) {
      return [=, norm = by.from(from + c), step = of.pitch](int64_t row, auto part) {
        return activate<act, Element>(norm(load_lanes<float>(x + row * step + c, part)));
      };
    });
  }
  std::array<Ahead, 2> ahead(int64_t r, int64_t rows, int64_t from, int64_t count, int64_t times) const {
    return {Ahead(of.x + r * of.pitch + from, of.pitch, count, rows, times), {}};
  }
};

// y's gradient with what comes to it by way of y's statistics: dy + shift + scale * (y - mean).
struct Tilted {
  Columns grad;
  const Element* y;
  Constants by;
  int64_t group = 0, row = 0, each = 1;  // by which spread() counts: the first column; rows, or pixels, of which a row has `each`
  Tilted from_pixel(int64_t pixel, int64_t channels, int64_t each) const {
    return {{grad.x + pixel * channels, nullptr, each * channels, each * channels}, y + pixel * channels, by, 0, pixel, each};
  }
  void enter(int64_t, int64_t) const {}
  template <Words words>
  void pack(int64_t r, int64_t rows, int64_t from, int64_t count, Packed<words>* to, int64_t pitch) const {
    const int64_t first = r * grad.pitch + from;
    pack_block<words>(rows, count, to, pitch, [&](int64_t c) {
      return [=, dy = grad.x + first + c, y = y + first + c, tilt = by.from(from + c), step = grad.pitch, number = row + r * each,
              each = each, column = group + from + c](int64_t row, auto part) {
        const Vec<float> sum = load_lanes<float>(dy + row * step, part) + tilt(load_lanes<float>(y + row * step, part));
        return spread(sum, number + row * each, column);
      };
    });
  }
  std::array<Ahead, 2> ahead(int64_t r, int64_t rows, int64_t from, int64_t count, int64_t times) const {
    const int64_t at = r * grad.pitch + from;
    return {Ahead(grad.x + at, grad.pitch, count, rows, times), Ahead(y + at, grad.pitch, count, rows, times)};
  }
};

// ---- windows of a map, as rows ----

// The fewest pixels that are whole vectors.
inline int64_t whole_pixels(int64_t channels) { return kLane / std::gcd(channels, int64_t{kLane}); }

// Pixels that a few windows look at: lines of the map one after the other, with zeros where there is no map, so that
// a window's lines are the same distance apart in all of them.
struct Seen {
  int64_t line;  // numbers of one
  Buffer<Element> pixels;
  Buffer<int64_t> starts;  // where the windows begin
  int64_t first = 0;
  Seen(const Windows& of, int64_t most) : line(((of.across - 1) * of.step + of.wide) * of.channels) {
    const int64_t lines = (most + of.across - 2) / of.across + 1, images = (lines + of.down - 2) / of.down + 1;
    pixels = allocate<Element>((lines * of.step + images * of.high) * line + kLane);
    starts = allocate<int64_t>(most);
  }
};

// Rows that are windows, of a map whose pixels are the rows of `of`.
struct Windowed {
  const Windows& windows;
  Seen& seen;
  const void* of;
  void (*pack_pixels)(const void* of, int64_t channels, int64_t pixel, int64_t count, Element* to);
  std::array<Ahead, 2> (*pixels_ahead)(const void* of, int64_t channels, int64_t pixel, int64_t count, int64_t times);

  template <class Of>
  Windowed(const Windows& windows, Seen& seen, const Of& of)
      : windows(windows), seen(seen), of(&of), pack_pixels(pack_from<Of>), pixels_ahead(ahead_of<Of>) {}

  template <class Of>
  static void pack_from(const void* of, int64_t channels, int64_t pixel, int64_t count, Element* to) {
    const Of& from = *static_cast<const Of*>(of);
    if constexpr (std::is_same_v<Of, Plain>) {
      std::memcpy(to, from.of.x + pixel * channels, count * channels * sizeof(Element));
    } else {  // as many pixels at once as are whole vectors, then what is left
      const int64_t each = whole_pixels(channels), numbers = each * channels, many = count / each;
      const Of rows = from.from_pixel(pixel, channels, each);
      rows.template pack<Words::along>(0, many, 0, numbers, to, numbers);
      if (count % each) rows.template pack<Words::along>(many, 1, 0, count % each * channels, to + many * numbers, numbers);
    }
  }
  template <class Of>
  static std::array<Ahead, 2> ahead_of(const void* of, int64_t channels, int64_t pixel, int64_t count, int64_t times) {
    return static_cast<const Of*>(of)->ahead(pixel, count, 0, channels, times);
  }

  Windowed operator()(int64_t) const { return *this; }  // of a group: windows have one
  void enter(int64_t first, int64_t last) const {
    const int64_t each = windows.down * windows.across;
    Element* to = seen.pixels.get();
    seen.first = first;
    for (int64_t r = first; r < last;) {
      const int64_t image = r / each, end = std::min(last, (image + 1) * each);
      const int64_t top = r % each / windows.across, bottom = (end - 1) % each / windows.across;
      for (int64_t i = top, j = r % windows.across; r < end; ++r) {
        seen.starts[r - first] = (to - seen.pixels.get()) + (i - top) * windows.step * seen.line + j * windows.step * windows.channels;
        if (++j == windows.across) ++i, j = 0;
      }
      const int64_t begin = top * windows.step + windows.top;
      for (int64_t y = begin; y < begin + (bottom - top) * windows.step + windows.high; ++y, to += seen.line) pack_line(image, y, to);
    }
  }
  void pack_line(int64_t image, int64_t y, Element* to) const {
    const int64_t channels = windows.channels, pixels = seen.line / channels;
    const bool inside = y >= 0 && y < windows.height;
    const int64_t from = inside ? std::clamp<int64_t>(-windows.left, 0, pixels) : pixels;
    const int64_t until = inside ? std::clamp<int64_t>(windows.width - windows.left, from, pixels) : pixels;
    std::fill_n(to, from * channels, Element{});
    pack_pixels(of, channels, (image * windows.height + y) * windows.width + windows.left + from, until - from, to + from * channels);
    std::fill_n(to + until * channels, (pixels - until) * channels, Element{});
  }

  // A vector of columns from c on: of one line of a window mostly, else of pieces of several.
  struct Pieces {
    int64_t from[kLane];  // of each piece, from a window's start on, if it began with the first lane
    uint32_t lanes[kLane];
    int count = 0;
    Pieces(int64_t c, int64_t wanted, int64_t run, int64_t line) {
      wanted = std::min<int64_t>(wanted, kLane);
      int64_t start = c / run * line, s = c % run;
      for (int64_t l = 0; l < wanted; start += line, s = 0, ++count) {
        const int64_t some = std::min(run - s, wanted - l);
        from[count] = start + s - l;
        lanes[count] = ((1u << some) - 1) << l;
        l += some;
      }
    }
    Vec<float> load_at(const Element* start) const {
#if defined(__AVX512BF16__)
      __m256i v = _mm256_setzero_si256();
      for (int i = 0; i < count; ++i) v = _mm256_mask_loadu_epi16(v, static_cast<__mmask16>(lanes[i]), start + from[i]);
      return widen_all(v);
#elif defined(__AVX512F__)
      Vec<float> v = {};
      for (int i = 0; i < count; ++i) v = _mm512_mask_loadu_ps(v, static_cast<__mmask16>(lanes[i]), start + from[i]);
      return v;
#else
      Vec<float> v = {};
      for (int i = 0; i < count; ++i)
        for (uint32_t left = lanes[i]; left; left &= left - 1) v[__builtin_ctz(left)] = widen<float>(start[from[i] + __builtin_ctz(left)]);
      return v;
#endif
    }
  };
  template <Words words>
  void pack(int64_t r, int64_t rows, int64_t from, int64_t count, Packed<words>* to, int64_t pitch) const {
    const int64_t run = windows.wide * windows.channels;
    const Element* pixels = seen.pixels.get();
    const int64_t* starts = seen.starts.get() + (r - seen.first);
    pack_block<words>(rows, count, to, pitch, [&](int64_t c) {
      const Pieces pieces(from + c, count - c, run, seen.line);
      return [=](int64_t row, auto) {
        const Element* start = pixels + starts[row];
        return pieces.count == 1 ? load_as<float>(start + pieces.from[0]) : pieces.load_at(start);
      };
    });
  }

  // Windows of one line can be multiplied as they lie there, without being packed: most of what they see is the same.
  // Then tiles end where lines do, and stretches of a sum are so many words from word `from` on, of whole lines of
  // windows or of a part of one.
  bool as_they_lie() const { return windows.wide * windows.channels % kTerms == 0; }
  int64_t tile_end(int64_t r, int64_t last) const {
    const int64_t most = (windows.across + tiles_of(windows.across) - 1) / tiles_of(windows.across), j = r % windows.across;
    return std::min(last, r - j + std::min(windows.across, (j / most + 1) * most));
  }
  int64_t line_words() const { return windows.wide * windows.channels / kTerms; }
  int64_t words_from(int64_t from) const {
    constexpr int64_t most = kDeep + kDeep / 8;
    if (line_words() <= most) return std::min(most / line_words(), windows.high - from / line_words()) * line_words();
    return std::min(stretch(line_words()), line_words() - from % line_words());
  }
  void tile_sums(bool fresh, int64_t r, int64_t height, int64_t from, int64_t words, const float* right, int columns, float* to) const {
    const Element* left = seen.pixels.get() + seen.starts[r - seen.first] + from / line_words() * seen.line + from % line_words() * kTerms;
    const int64_t pitch = windows.step * windows.channels;
    with_tile(height, columns, [&](auto height, auto vectors) { tile_of<height(), vectors()>(fresh, left, pitch, words, right, to); });
  }
  template <int R, int V>
  void tile_of(bool fresh, const Element* left, int64_t pitch, int64_t words, const float* right, float* to) const {
    constexpr int kApart = 3, kBases = (R + kApart - 1) / kApart;  // rows that one address serves
    Vec<float> sums[R][V] = {};
    for (; words > 0; words -= line_words(), left += seen.line) {
      const Element* base[kBases];
      for (int i = 0; i < kBases; ++i) base[i] = left + i * kApart * pitch;
      for (int64_t n = std::min(words, line_words()); n > 0; --n, right += kWide) {
        Vec<float> y[V];
        for (int v = 0; v < V; ++v) y[v] = load(right + v * kLane);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          float word;
          std::memcpy(&word, base[r / kApart] + r % kApart * pitch, sizeof word);
          for (int v = 0; v < V; ++v) sums[r][v] = with_product<kPairs, float>(sums[r][v], splat(word), y[v]);
        }
        for (int i = 0; i < kBases; ++i) base[i] += kTerms;
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < V; ++v) {
        float* at = to + r * kWide + v * kLane;
        store(at, fresh ? sums[r][v] : load(at) + sums[r][v]);
      }
  }

  std::array<Ahead, 2> ahead(int64_t r, int64_t rows, int64_t, int64_t, int64_t times) const {
    if (rows <= 0) return {};
    const auto line_of = [&](int64_t row, int64_t beyond) {  // of all images
      const int64_t y = row / windows.across % windows.down * windows.step + windows.top + beyond;
      return row / (windows.down * windows.across) * windows.height + std::clamp<int64_t>(y, 0, windows.height);
    };
    const int64_t from = line_of(r, 0), until = line_of(r + rows - 1, windows.high);
    return pixels_ahead(of, windows.channels, from * windows.width, std::max<int64_t>(0, until - from) * windows.width, times);
  }
};

// Rows [begin, end) of a left side, to [tile][stretch][row][kPitch].
template <class Rows>
void pack_rows(const Rows& rows, int64_t terms, int64_t begin, int64_t end, float* packed) {
  constexpr int64_t pitch = kPitch * kTerms;
  const int64_t step = stretch(words_of(terms)) * kTerms;
  Element* to = reinterpret_cast<Element*>(packed);
  for (int64_t r = begin; r < end; r += kRows)
    for (int64_t from = 0; from < terms; from += step, to += kRows * pitch) {
      const int64_t height = std::min<int64_t>(kRows, end - r), count = std::min(step, terms - from);
      rows.template pack<Words::along>(r, height, from, count, to, pitch);
      for (int64_t row = 0; row < height; ++row) end_row(to + row * pitch, count);
    }
}

// ---- products ----

// A tile of `height` rows by a panel's columns, over `words` words of both, packed, the left side's kRow and kStep
// apart: to `to`, instead of what is there or added to it.
template <int kRow, int kStep>
void tile_sums(bool fresh, const float* left, const float* right, int64_t words, int64_t height, int columns, float* to,
               int64_t pitch) {
  with_tile(height, columns, [&](auto height, auto vectors) {
    const auto product = [&](auto take) {
      product_tile<float, height(), vectors(), kRow, kStep, false, kPairs>(left, right, kWide, words, nullptr, take);
    };
    float* const sums = to;
    if (fresh)
      product([&](int i, int v, Vec<float> sum) { store(sums + i * pitch + v * kLane, sum); });
    else
      product([&](int i, int v, Vec<float> sum) {
        float* at = sums + i * pitch + v * kLane;
        store(at, load(at) + sum);
      });
  });
}

// Where rows of dx are: one after the other, or the pixels of a map at which windows begin.
const Windows kAll;
inline int64_t input_pitch(const LinearBackward& call) {
  return call.places ? call.places.channels : call.groups * call.in;
}
struct Places {
  const Windows& at;
  // f(row): row(i) is where row begin + i is, of those before `end`, kRows at most.
  template <class F>
  void with_rows(int64_t begin, int64_t end, F f) const {
    if (!at) return f([begin](int64_t i) { return begin + i; });
    int64_t rows[kRows];
    const int64_t lines = begin / at.across;
    int64_t j = begin % at.across, line = lines % at.down, image = lines / at.down;
    for (int64_t i = 0; i < end - begin; ++i) {
      rows[i] = (image * at.height + line * at.step + at.top) * at.width + j * at.step + at.left;
      if (++j == at.across) j = 0, ++line;
      if (line == at.down) line = 0, ++image;
    }
    f([&rows](int64_t i) { return rows[i]; });
  }
  // Columns of rows [first, last), as far as memory needed next knows: an image's last line is as all others.
  Ahead ahead(const Element* columns, int64_t pitch, int64_t count, int64_t first, int64_t last, int64_t times) const {
    if (!at || first >= last) return {columns + first * pitch, pitch, count, last - first, times};
    Ahead memory;
    with_rows(first, first + 1, [&](auto row) { memory = Ahead(columns + row(0) * pitch, pitch * at.step, count, last - first, times); });
    memory.line = at.across, memory.left = at.across - first % at.across;
    memory.gap = at.step * (at.width - at.across) * pitch * static_cast<int64_t>(sizeof(Element));
    return memory;
  }
};

// What becomes of a panel's sums, a tile of rows after the other: they are written down, plus a number for each
// column, where there is one. reads() and writes() are the memory that rows() reads and writes, within so many calls
// of fetch() and claim(). Nothing reads again what it wrote: such stores may wait for memory, and loads whose
// addresses end in the same twelve bits, as rows' often do, for them.
struct Written {
  Element* to;  // the panel's columns
  int64_t pitch, columns, first, last;
  Places places;
  const float* added = nullptr;

  Ahead reads(int64_t) const { return {}; }
  Ahead writes(int64_t times) const { return places.ahead(to, pitch, columns, first, last, times); }
  void rows(int64_t begin, int64_t end, const float* sums) const {
    places.with_rows(begin, end, [&](auto row) {
      for_channels<float>(columns, [&](int64_t at, auto part) {
        const Vec<float> plus = added ? load_lanes<float>(added + at, part) : Vec<float>{};
        for (int64_t i = 0; i < end - begin; ++i) store_lanes<float>(to + row(i) * pitch + at, load(sums + i * kWide + at) + plus, part);
      });
    });
  }
  void all() const {}
};

// Rows [begin, end) of in(g), of `terms` terms, times the `panels` panels of group g's packed weight.
// finish(g, p, first, last) is what becomes of rows [first, last) times panel p.
template <class In, class Finish>
void rows_product(int64_t groups, int64_t terms, int64_t panels, In in, Finish finish, const float* packed, int64_t begin,
                  int64_t end) {
  const int64_t words = words_of(terms), step = stretch(words), size = stretches(words) * kRows * kPitch;
  constexpr bool kOfWindows = std::is_same_v<decltype(in(0)), Windowed>;
  bool packs = true;
  if constexpr (kOfWindows) packs = !in(0).as_they_lie();
  const Buffer<float> left = allocate<float>(packs ? kChunk / kRows * size : 0), sums = allocate<float>(kChunk * kWide);
  for (int64_t first = begin; first < end; first += kChunk) {
    const int64_t last = std::min(end, first + kChunk);
    for (int64_t g = 0; g < groups; ++g) {
      const auto rows = in(g);
      rows.enter(first, last);
      if (packs) pack_rows(rows, terms, first, last, left.get());
      const int64_t times = stretches(words) * tiles_of(last - first);
      // Rows that come next: of the next group, or the next chunk.
      const int64_t g_next = g + 1 < groups ? g + 1 : 0, first_next = g_next ? first : last;
      const int64_t last_next = g_next ? last : std::min(end, last + kChunk);
      auto inputs_next = in(g_next).ahead(first_next, last_next - first_next, 0, terms, times * panels);
      for (int64_t p = 0; p < panels; ++p) {
        auto finishing = finish(g, p, first, last);
        const auto panel_next = p + 1 < panels ? finish(g, p + 1, first, last) : finish(g_next, 0, first_next, last_next);
        Ahead reads_next = panel_next.reads(times), writes_next = panel_next.writes(times);
        const float* panel = packed + (g * panels + p) * words * kWide;
        const int columns = static_cast<int>(finishing.columns);
        for (int64_t from = 0, some; from < words; from += some) {
          some = std::min(step, words - from);
          if constexpr (kOfWindows) some = packs ? some : rows.words_from(from);
          for (int64_t r = first, until; r < last; r = until) {
            inputs_next[0].fetch(), inputs_next[1].fetch(), reads_next.fetch(), writes_next.claim();
            until = std::min<int64_t>(last, r + kRows);
            if constexpr (kOfWindows) until = packs ? until : rows.tile_end(r, last);
            float* tile = sums.get() + (r - first) * kWide;
            if (packs)
              tile_sums<kPitch, 1>(from == 0, left.get() + (r - first) / kRows * size + from / step * kRows * kPitch,
                                   panel + from * kWide, some, until - r, columns, tile, kWide);
            else if constexpr (kOfWindows)
              rows.tile_sums(from == 0, r, until - r, from, some, panel + from * kWide, columns, tile);
            if (from + some >= words) finishing.rows(r, until, tile);
          }
        }
        finishing.all();
      }
    }
  }
}

// ---- the weight's gradient ----

// The first of `count` results that tile t of them has, where tiles are of nearly the same height.
inline int64_t tile_begin(int64_t count, int64_t t) { return t * count / tiles_of(count); }

// A weight's gradient is made a part of the rows at a time, and a part a unit of tiles of outputs and panels of
// inputs at a time, x's inputs and m's side by side.
int64_t part_rows(const LinearCall& call) {  // by the shape alone, so that sums have one order for any number of threads
  const int64_t parts = std::clamp<int64_t>((call.rows + kPartRows - 1) / kPartRows, 1, kParts);
  return std::max<int64_t>(1, (call.rows + parts - 1) / parts);
}
int64_t weight_panels(const LinearCall& call) { return (call.in * call.sides + kWide - 1) / kWide; }
int64_t units_across(const LinearCall& call) { return (weight_panels(call) + kPanels - 1) / kPanels; }
int64_t units_down(const LinearCall& call) { return (tiles_of(call.out) + kTiles - 1) / kTiles; }

struct Unit {
  int64_t from, to, top, bottom;  // panels, and tiles
  Unit(const LinearCall& call, int64_t unit) {
    const int64_t across = units_across(call), down = units_down(call), p = unit % across, t = unit / across % down;
    from = p * weight_panels(call) / across, to = (p + 1) * weight_panels(call) / across;
    top = t * tiles_of(call.out) / down, bottom = (t + 1) * tiles_of(call.out) / down;
  }
};

// Units [begin, end) of one part, and what they are made of.
struct PartOfUnits {
  int64_t begin, end, part, group;
  int64_t first, last, step;        // rows, and how many at once
  int64_t from, to, top, bottom;    // panels, and tiles
  int64_t at, columns, out, height;  // of x and m; of y
  int64_t tiles = 0;
  PartOfUnits(const LinearCall& call, int64_t unit, int64_t until) : begin(unit) {
    const int64_t each = units_across(call) * units_down(call);
    part = unit / each, group = part % call.groups, end = std::min(until, (part + 1) * each);
    first = part / call.groups * part_rows(call), last = std::min(call.rows, first + part_rows(call));
    const int64_t words = words_of(last - first), blocks = (words + kBlock - 1) / kBlock;
    step = blocks ? (words + blocks - 1) / blocks * kTerms : 0;
    from = weight_panels(call), to = 0, top = tiles_of(call.out), bottom = 0;
    for (int64_t u = begin; u < end; ++u) {
      const Unit of(call, u);
      from = std::min(from, of.from), to = std::max(to, of.to), top = std::min(top, of.top), bottom = std::max(bottom, of.bottom);
      tiles += (of.to - of.from) * (of.bottom - of.top);
    }
    at = from * kWide, columns = std::min(to * kWide, call.in * call.sides) - at;
    out = tile_begin(call.out, top), height = tile_begin(call.out, bottom) - out;
  }
};

// Units [begin, end) of grad(g)ᵀ x(g). Rows are packed once for all units of a part.
template <class X, class Grad>
void weight_units(const LinearCall& call, X x, Grad grad, float* parts, int64_t begin, int64_t end) {
  // Blocks of a panel and of a tile; the lines beyond keep those of the next from sharing cache sets.
  constexpr int64_t kPanel = kBlock * kWide + 32, kTile = kBlock * kPackedRows + 16;
  const int64_t out = call.out, terms = call.in * call.sides, pitch = weight_panels(call) * kWide;
  const auto width = [&](int64_t p) { return std::min<int64_t>(kWide, terms - p * kWide); };
  const bool one = end - begin <= 1;  // of several, a part may have all
  const Buffer<float> left = allocate<float>((one ? std::min(kTiles, tiles_of(out)) : tiles_of(out)) * kTile);
  const Buffer<float> right = allocate<float>((one ? std::min(kPanels, weight_panels(call)) : weight_panels(call)) * kPanel);
  for (int64_t u = begin; u < end;) {
    const PartOfUnits now(call, u, end);
    u = now.end;
    const auto rows_of_x = x(now.group);
    const auto rows_of_grad = grad(now.group);
    for (int64_t first = now.first; first < now.last; first += now.step) {
      const int64_t last = std::min(now.last, first + now.step);
      rows_of_x.enter(first, last), rows_of_grad.enter(first, last);
      for (int64_t r = first; r < last; r += kPackRows) {
        const int64_t rows = std::min(kPackRows, last - r), word = (r - first) / kTerms;
        for (int64_t p = now.from; p < now.to; ++p)
          rows_of_x.template pack<Words::across>(r, rows, p * kWide, width(p), right.get() + (p - now.from) * kPanel + word * kWide,
                                                 kWide);
        for (int64_t t = now.top; t < now.bottom; ++t) {
          const int64_t o = tile_begin(out, t), height = tile_begin(out, t + 1) - o;
          rows_of_grad.template pack<Words::across>(r, rows, o, height, left.get() + (t - now.top) * kTile + word * kPackedRows,
                                                    kPackedRows);
        }
      }
      // What is packed next, of this part or of the one after it.
      const bool same = last < now.last;
      const PartOfUnits next = same || u == end ? now : PartOfUnits(call, u, end);
      const int64_t later = same ? last : next.first;
      const int64_t rows = same || u < end ? std::min(next.last, later + next.step) - later : 0;
      auto of_x = x(next.group).ahead(later, rows, next.at, next.columns, now.tiles);
      auto of_grad = grad(next.group).ahead(later, rows, next.out, next.height, now.tiles);
      float* sums = parts + now.part * out * pitch;
      const bool fresh = first == now.first;
      for (int64_t v = now.begin; v < now.end; ++v) {
        const Unit unit(call, v);
        for (int64_t p = unit.from; p < unit.to; ++p)
          for (int64_t t = unit.top; t < unit.bottom; ++t) {
            for (auto* memory : {&of_x[0], &of_x[1], &of_grad[0], &of_grad[1]}) memory->fetch();
            const int64_t o = tile_begin(out, t), height = tile_begin(out, t + 1) - o;
            float* to = sums + o * pitch + p * kWide;
            for (int64_t i = 0; i < (fresh ? 0 : height); ++i)
              for (int n = 0; n < kWide; n += 16) __builtin_prefetch(to + i * pitch + n, 1, 3);
            tile_sums<1, kPackedRows>(fresh, left.get() + (t - now.top) * kTile, right.get() + (p - now.from) * kPanel,
                                      words_of(last - first), height, static_cast<int>(width(p)), to, pitch);
          }
      }
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
  const int64_t columns = !call.mean ? 0 : call.windows ? whole_pixels(call.channels) * call.channels : call.groups * call.in;
  AllConstants all(columns);
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t c = i % call.channels;
    all.mean[i] = call.mean[c];
    all.scale[i] = reciprocal_deviation(call, c) * (call.scale ? call.scale[c] : 1);
    all.shift[i] = call.shift ? call.shift[c] : 0;
  }
  return all;
}

AllConstants tilt_of_y(const LinearBackward& call) {
  const int64_t channels = call.grad_windows ? call.grad_windows.channels : call.groups * call.out;
  const int64_t columns = !call.y ? 0 : call.grad_windows ? whole_pixels(channels) * channels : channels;
  AllConstants all(columns);
  const float rows = static_cast<float>(call.results);
  for (int64_t i = 0; i < columns; ++i) {
    const int64_t c = i % channels;
    all.mean[i] = call.y_mean[c];
    all.scale[i] = 2 * call.dy_var[c] / rows;
    all.shift[i] = call.dy_mean[c] / rows;
  }
  return all;
}

// f(rows of x) and f(rows of dy), whatever they are made of: of a group, or a map's pixels.
template <class F>
void with_x(const LinearCall& call, const AllConstants& norm, F f) {
  if (!call.mean) return f([&](int64_t g) { return Plain{inputs(call, g)}; });
  with_activation(call.act, [&](auto act) {
    f([&](int64_t g) { return Normed<act()>{inputs(call, g), norm.of(g * call.in)}; });
  });
}
template <class F>
void with_grad(const LinearBackward& call, const AllConstants& tilt, F f) {
  if (call.y)
    f([&](int64_t g) { return Tilted{outputs(call, g), elements(call.y) + g * call.out, tilt.of(g * call.out), g * call.out}; });
  else
    f([&](int64_t g) { return Plain{outputs(call, g)}; });
}

// f(these rows), or of windows of them.
template <class Of, class F>
void with_windows(const Windows& windows, Of of, F f) {
  if (!windows) return f(of);
  Seen seen(windows, std::max(kChunk, kBlock * kTerms));
  const auto pixels = of(0);
  f(Windowed(windows, seen, pixels));
}

// Four sums, each of every fourth row: one alone would wait for its own last addition.
struct Sums {
  Vec<float> of[4] = {};
  Vec<float> total() const { return (of[0] + of[1]) + (of[2] + of[3]); }
};

// A panel of y is written down, and the chunk's mean and squared differences from it are taken: as norm.cpp takes
// them, as differences from the mean of its first rows.
struct Stats {
  const LinearForward& call;
  int64_t c, columns, first, last;  // the panel's channels, and the chunk's rows
  Vec<float> centre[2] = {}, sum[2] = {}, square[2] = {};

  int64_t channels() const { return call.groups * call.out; }
  Ahead reads(int64_t) const { return {}; }
  Ahead writes(int64_t times) const { return {elements(call.y) + first * channels() + c, channels(), columns, last - first, times}; }
  void rows(int64_t begin, int64_t end, const float* sums) {
    for_channels<float>(columns, [&](int64_t at, auto part) {
      const int64_t v = at / kLane;
      const auto load_row = [&](int64_t r) { return stored(load(sums + (r - begin) * kWide + at)); };
      if (begin == first) {
        const int64_t few = std::min<int64_t>(8, end - begin);
        for (int64_t r = 0; r < few; ++r) centre[v] += load_row(begin + r);
        centre[v] /= splat(static_cast<float>(few));
      }
      Sums s, q;
      by_fours(begin, end, [&](int64_t r, auto count) {
        for (int i = 0; i < count; ++i) {
          const Vec<float> y = load_row(r + i), d = y - centre[v];
          store_lanes<float>(elements(call.y) + (r + i) * channels() + c + at, y, part);
          s.of[i] += d;
          q.of[i] += d * d;
        }
      });
      sum[v] += s.total();
      square[v] += q.total();
    });
  }
  void all() const {
    double* to = call.parts + first / kChunk * 2 * channels() + c;
    for (int64_t i = 0; i < columns; ++i) {
      const double s = sum[i / kLane][i % kLane], mean = s / static_cast<double>(last - first);
      to[i] = centre[i / kLane][i % kLane] + mean;
      to[channels() + i] = std::max(square[i / kLane][i % kLane] - s * mean, 0.0);  // a NaN stays
    }
  }
};

// A panel of dx: what is the gradient of the normed and activated x becomes that of x alone, mean and variance
// apart; and the chunk's sums of the norm's gradient, and of that times x - mean.
template <NormAct act>
struct InputSlopes {
  const LinearBackward& call;
  Constants by;  // of the panel's channels
  int64_t c, columns, first, last;
  Vec<float> sum[2] = {}, along[2] = {};

  int64_t channels() const { return call.groups * call.in; }
  Ahead ahead(const void* of, int64_t times) const {
    return Places{call.places}.ahead(elements(of) + c, input_pitch(call), columns, first, last, times);
  }
  Ahead reads(int64_t times) const { return ahead(call.x, times); }
  Ahead writes(int64_t times) const { return ahead(call.dx, times); }
  void rows(int64_t begin, int64_t end, const float* sums) {
    const int64_t pitch = input_pitch(call);
    Places{call.places}.with_rows(begin, end, [&](auto row) {
      for_channels<float>(columns, [&](int64_t at, auto part) {
        const int64_t v = at / kLane;
        const Vec<float> mean = load(by.mean + at), scale = load(by.scale + at), shift = load(by.shift + at);
        Sums s, a;
        by_fours(0, end - begin, [&](int64_t r, auto count) {
          for (int i = 0; i < count; ++i) {
            const int64_t where = row(r + i) * pitch + c + at;
            const Vec<float> d = load_lanes<float>(elements(call.x) + where, part) - mean;
            const Vec<float> here = slope<act, Element>(load(sums + (r + i) * kWide + at), d * scale + shift);
            s.of[i] += here;
            a.of[i] += here * d;
            store_lanes<float>(elements(call.dx) + where, here * scale, part);
          }
        });
        sum[v] += s.total();
        along[v] += a.total();
      });
    });
  }
  void all() const {
    double* to = call.parts + first / kChunk * 2 * channels() + c;
    for (int64_t i = 0; i < columns; ++i) to[i] = sum[i / kLane][i % kLane], to[channels() + i] = along[i / kLane][i % kLane];
  }
};

int64_t panel_size(const LinearCall& call, bool transposed) {
  return words_of(transposed ? call.out : call.in * call.sides) * kWide;
}

}  // namespace

int64_t linear_units(const LinearCall& call, bool transposed) { return call.groups * Panel::all(call, transposed); }
int64_t linear_packed(const LinearCall& call, bool transposed) {
  return linear_units(call, transposed) * panel_size(call, transposed) * static_cast<int64_t>(sizeof(float));
}
void linear_pack(const LinearCall& call, bool transposed, void* packed, int64_t begin, int64_t end) {
  const int64_t panels = Panel::all(call, transposed);
  for (int64_t u = begin; u < end; ++u)
    pack_panel(call, transposed, u / panels, u % panels, static_cast<float*>(packed) + u * panel_size(call, transposed));
}

int64_t linear_chunk() { return kChunk; }

void linear(const LinearForward& call, const void* packed, int64_t begin, int64_t end) {
  const AllConstants norm = norm_of_x(call);
  with_x(call, norm, [&](auto x) { with_windows(call.windows, x, [&](auto in) {
    const auto run = [&](auto finish) {
      rows_product(call.groups, call.in * call.sides, Panel::all(call, false), in, finish, static_cast<const float*>(packed), begin, end);
    };
    const auto columns = [&](int64_t p) { return std::min<int64_t>(kWide, call.out - p * kWide); };
    if (call.y_mean)
      run([&](int64_t g, int64_t p, int64_t first, int64_t last) {
        return Stats{call, g * call.out + p * kWide, columns(p), first, last};
      });
    else
      run([&](int64_t g, int64_t p, int64_t first, int64_t last) {
        const int64_t c = g * call.out + p * kWide;
        return Written{elements(call.y) + c, call.groups * call.out, columns(p), first, last, {kAll}, call.bias ? call.bias + c : nullptr};
      });
  }); });
}

void linear_merge_stats(const LinearForward& call) {
  merge_stats(call.rows, kChunk, call.groups * call.out, call.parts, call.y_mean, call.y_var);
}

void linear_input_gradient(const LinearBackward& call, const void* packed, int64_t begin, int64_t end) {
  const AllConstants norm = norm_of_x(call), tilt = tilt_of_y(call);
  with_grad(call, tilt, [&](auto grad) { with_windows(call.grad_windows, grad, [&](auto in) {
    const auto run = [&](auto finish) {
      rows_product(call.groups, call.out, Panel::all(call, true), in, finish, static_cast<const float*>(packed), begin, end);
    };
    if (!call.mean)
      return run([&](int64_t g, int64_t p, int64_t first, int64_t last) {
        const Panel panel(call, true, p);
        return Written{elements(panel.side ? call.dm : call.dx) + g * call.in + panel.at, input_pitch(call), panel.columns, first, last,
                       {call.places}};
      });
    with_activation(call.act, [&](auto act) {
      run([&](int64_t g, int64_t p, int64_t first, int64_t last) {
        const int64_t c = g * call.in + p * kWide;
        return InputSlopes<act()>{call, norm.of(c), c, std::min<int64_t>(kWide, call.in - p * kWide), first, last};
      });
    });
  }); });
}

void linear_merge_gradients(const LinearBackward& call, int64_t chunks) {
  const int64_t columns = call.groups * call.in;
  for (int64_t c = 0; c < call.channels; ++c) {
    double sum = 0, along = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t i = c; i < columns; i += call.channels) {
        sum += call.parts[chunk * 2 * columns + i];
        along += call.parts[(chunk * 2 + 1) * columns + i];
      }
    const double rstd = reciprocal_deviation(call, c), scale = call.scale ? call.scale[c] : 1;
    call.dshift[c] = static_cast<float>(sum);
    call.dscale[c] = static_cast<float>(along * rstd);
    call.dmean[c] = static_cast<float>(-sum * rstd * scale);
    call.dvar[c] = static_cast<float>(-0.5 * along * rstd * rstd * rstd * scale);
  }
}

int64_t linear_parts(const LinearCall& call) { return call.groups * ((call.rows + part_rows(call) - 1) / part_rows(call)); }
int64_t linear_part_size(const LinearCall& call) { return call.out * weight_panels(call) * kWide; }
int64_t linear_part_units(const LinearCall& call) { return units_across(call) * units_down(call); }

void linear_weight_parts(const LinearBackward& call, float* parts, int64_t begin, int64_t end) {
  const AllConstants norm = norm_of_x(call), tilt = tilt_of_y(call);
  with_x(call, norm, [&](auto x) { with_windows(call.windows, x, [&](auto rows) {
    with_grad(call, tilt, [&](auto grad) { weight_units(call, rows, grad, parts, begin, end); });
  }); });
}

void linear_weight_merge(const LinearBackward& call, const float* parts, int64_t begin, int64_t end) {
  const int64_t pitch = weight_panels(call) * kWide, count = linear_parts(call);
  const Buffer<float> sum = allocate<float>(pitch);
  for (int64_t row = begin; row < end; ++row) {
    std::fill_n(sum.get(), pitch, 0.0f);
    for (int64_t i = row / call.out; i < count; i += call.groups) {
      const float* part = parts + i * linear_part_size(call) + row % call.out * pitch;
      for (int64_t c = 0; c < pitch; ++c) sum[c] += part[c];
    }
    float* to = call.dweight + row * call.in * call.sides;
    for (int64_t c = 0; c < call.in; ++c)
      call.sides == 2 ? (to[2 * c] = sum[c], to[2 * c + 1] = sum[call.in + c]) : to[c] = sum[c];
  }
}

}  // namespace fer::cpu::FER_ISA
