// linear on processors that multiply tiles of bfloat16 (AMX); linear.cpp is for all others, and for normed products.
//
// A tile instruction multiplies sixteen times as fast as a vector instruction of float32. So a float32 number
// is taken apart into three bfloat16 pieces, of eight bits each, which together are the number; and of the
// nine products of pieces the three smallest, below the last bit of the largest, are left out. Six fast
// products beat one slow one, and are as exact: 32 terms are added up from zero before they come to the sum, so
// that most roundings are of small numbers.
//
// Operands are packed into tiles of 1 KB, piece after piece: sixteen rows of 32 numbers on the left side, and
// on the right sixteen rows of pairs of numbers, (2p, 2p + 1), for sixteen columns. Inputs of all kinds come
// as blocks of sixteen columns, the last of which may be narrower: so groups, and x and m side by side, cost
// no copy. Compiled for AVX-512 alone, which every processor with these tiles has, and for Linux, of which
// a process asks leave to use them.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "simd.h"

namespace fer::cpu::tiles {
namespace {

using namespace avx512;

constexpr int kPieces = 3;
constexpr int64_t kTile = 512;              // bfloat16 numbers of a tile
constexpr int64_t kStep = kPieces * kTile;  // of a step's tiles: sixteen rows, 32 of the numbers that are summed
// Steps that are multiplied at once: what two tiles of rows and two of columns take then, 48 KB, the innermost
// cache holds. With 6 steps instead, products took longer, although sums were written less often.
constexpr int64_t kDeep = 4;
constexpr int64_t kMostRows = 256;          // for which a weight is read once
constexpr int64_t kPanel = 24;              // blocks of a weight's gradient at once, either way: what the cache holds
constexpr int64_t kCalls = 6;               // of multiply's meanwhile() in a step
constexpr int64_t kPartRows = 1024, kParts = 8;  // of a weight's gradient: rows of a part, and most parts

// ---- tile instructions ----

// Not the compiler's intrinsics: gcc's do not say that they read memory.
template <int tile>
inline void tile_load(const void* from, int64_t pitch) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(pitch), "i"(tile) : "memory");
}
template <int tile>
inline void tile_store(void* to, int64_t pitch) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(pitch), "i"(tile) : "memory");
}
template <int tile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int sum, int left, int right>
inline void tile_product() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right));
}

// This thread's tiles, all of sixteen rows of 64 bytes, as long as it lives.
struct Tiles {
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~Tiles() { asm volatile("tilerelease"); }
};

// ---- pieces ----

typedef __m512i Pieces[kPieces];

// x as a sum of bfloat16 numbers, each in the upper half of a lane.
inline void split(__m512 x, Pieces& pieces) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)), half = _mm512_set1_epi32(0x8000);
#pragma GCC unroll 2
  for (int i = 0; i + 1 < kPieces; ++i) {  // the nearest: what is left has eight bits less
    pieces[i] = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half), upper);
    x = _mm512_sub_ps(x, _mm512_castsi512_ps(pieces[i]));
  }
  pieces[kPieces - 1] = _mm512_castps_si512(x);
}

// 32 numbers in their order, of one piece.
inline __m512i in_a_row(__m512i first, __m512i second) {
  alignas(64) static constexpr uint16_t upper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                     33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(first, _mm512_load_si512(upper), second);
}
// Sixteen pairs.
inline __m512i in_pairs(__m512i first, __m512i second) {
  const __m512i upper = _mm512_and_si512(second, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)));
  return _mm512_or_si512(_mm512_srli_epi32(first, 16), upper);
}

inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
  }
  for (int i = 0; i < 8; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
  }
}

// ---- blocks of sixteen columns ----

inline __m512 masked(const float* from, unsigned mask) { return _mm512_maskz_loadu_ps(mask, from); }

inline unsigned first_lanes(int64_t count) { return count >= 16 ? 0xFFFFu : count <= 0 ? 0u : (1u << count) - 1; }
inline int64_t blocks_of(int64_t columns) { return (columns + 15) / 16; }
inline int64_t steps_of(int64_t blocks) { return (blocks + 1) / 2; }
inline int64_t even(int64_t blocks) { return (blocks + 1) / 2 * 2; }

template <class Float>
struct Block {
  Float* first;  // of the first row
  unsigned mask;
};

// The columns of one group in one tensor, or in two side by side.
template <class Float>
struct Columns {
  Float *x, *m;
  int64_t width, pitch;

  int64_t blocks() const { return blocks_of(width) * (m ? 2 : 1); }
  Block<Float> operator[](int64_t b) const {
    const int64_t half = blocks_of(width), at = b % half * 16;
    if (b >= blocks()) return {x, 0};
    return {(b < half ? x : m) + at, first_lanes(width - at)};
  }
};

// Group g's columns of x and m, or their gradients, and of y or its gradient.
inline const float* floats(const void* of) { return static_cast<const float*>(of); }
inline float* floats(void* of) { return static_cast<float*>(of); }
template <class Float>
Columns<Float> inputs(const LinearCall& call, Float* x, Float* m, int64_t g) {
  return {x + g * call.in, m ? m + g * call.in : nullptr, call.in, call.groups * call.in};
}
template <class Float>
Columns<Float> outputs(const LinearCall& call, Float* y, int64_t g) {
  return {y + g * call.out, nullptr, call.out, call.groups * call.out};
}

// The sixteen numbers of a weight's row that belong to block b of its group's inputs; zeros where there are none.
inline __m512 weight_block(const LinearCall& call, int64_t group, int64_t row, int64_t b) {
  const int64_t half = blocks_of(call.in), at = b % half * 16, count = std::min<int64_t>(16, call.in - at);
  if (row >= call.out || b >= half * call.sides) return _mm512_setzero_ps();
  const float* weight = call.weight + (group * call.out + row) * call.in * call.sides;
  if (call.sides == 1) return masked(weight + at, first_lanes(count));
  const __m512 low = masked(weight + 2 * at, first_lanes(2 * count));
  const __m512 high = masked(weight + 2 * at + 16, first_lanes(2 * count - 16));
  const __m512i each = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return _mm512_permutex2var_ps(low, _mm512_add_epi32(each, _mm512_set1_epi32(b < half ? 0 : 1)), high);
}

// ---- packing ----

// Rows and steps of columns on their way to left tiles, [row tile][step][piece], a little at a time: while the
// tiles multiply, the processor has time for that. Rows beyond the last stay as they are: a row of the left side
// reaches its own row of the result alone, and nobody stores that.
struct Packing {
  Block<const float> blocks[2 * kDeep];
  int64_t pitch = 0, steps = 0, row = 0, rows = 0, step = 0;
  uint16_t* to = nullptr;

  Packing() = default;
  Packing(const Columns<const float>& columns, int64_t begin, int64_t end, int64_t from, int64_t to_step, uint16_t* to)
      : pitch(columns.pitch), steps(to_step - from), rows(end - begin), to(to) {
    for (int64_t b = 0; b < 2 * steps; ++b) {
      blocks[b] = columns[2 * from + b];
      blocks[b].first += begin * pitch;
    }
  }
  int64_t remaining() const { return (rows - row) * steps - step; }
  // The next step of a row.
  void one() {
    if (row == rows) return;
    Pieces first, second;
    const Block<const float> a = blocks[2 * step], b = blocks[2 * step + 1];
    const float* from = a.first + row * pitch;
    __builtin_prefetch(from + 8 * pitch), __builtin_prefetch(from + 8 * pitch + 16);
    split(masked(from, a.mask), first);
    split(masked(b.first + row * pitch, b.mask), second);
    uint16_t* tile = to + (row / 16 * steps + step) * kStep + row % 16 * 32;
    for (int i = 0; i < kPieces; ++i) _mm512_store_si512(tile + i * kTile, in_a_row(first[i], second[i]));
    if (++step == steps) step = 0, ++row;
  }
  void rest() {
    while (row < rows) one();
  }
};

inline void store_tile(uint16_t* tile, const __m512i (&rows)[kPieces][16]) {
  for (int i = 0; i < kPieces; ++i)
    for (int p = 0; p < 16; ++p) _mm512_store_si512(tile + i * kTile + p * 32, rows[i][p]);
}

// A right tile of the weight: for y, the inputs of step s to outputs of block b; for dx, the outputs of step s
// to inputs of block b.
void pack_weight(const LinearCall& call, bool transposed, int64_t group, int64_t b, int64_t s, uint16_t* tile) {
  __m512i rows[kPieces][16];
  for (int p = 0; p < 16; ++p) {
    Pieces first, second;
    const int64_t r = transposed ? 32 * s + 2 * p : 16 * b + p;
    split(weight_block(call, group, r, transposed ? b : 2 * s), first);
    split(weight_block(call, group, transposed ? r + 1 : r, transposed ? b : 2 * s + 1), second);
    for (int i = 0; i < kPieces; ++i)
      rows[i][p] = transposed ? in_pairs(first[i], second[i]) : in_a_row(first[i], second[i]);
  }
  if (!transposed)
    for (int i = 0; i < kPieces; ++i) transpose(rows[i]);
  store_tile(tile, rows);
}

// Blocks [from, to) of columns on their way to tiles for a product over rows [begin, end), 32 rows a tile, as the
// left side's, transposed, or as the right side's: [block][kDeep tiles]. A little at a time as well.
struct RowPacking {
  Columns<const float> columns;
  int64_t from = 0, to = 0, begin = 0, end = 0;
  bool left = false;
  uint16_t* packed = nullptr;
  int64_t row = begin, b = from, stage = 0;  // what comes next: of a tile, sixteen pairs of rows, then its pieces turned
  Block<const float> block = from < to ? columns[from] : Block<const float>{};

  int64_t stages() const { return left ? 16 + kPieces : 16; }
  int64_t count() const { return (end - begin + 31) / 32 * (to - from) * stages(); }
  bool one() {
    if (row >= end || from == to) return false;
    uint16_t* tile = packed + ((b - from) * kDeep + (row - begin) / 32) * kStep;
    if (stage < 16) {
      Pieces first, second;
      const int64_t at = row + 2 * stage;
      const float* numbers = block.first + at * columns.pitch;
      __builtin_prefetch(numbers + 64), __builtin_prefetch(numbers + columns.pitch + 64);
      split(masked(numbers, at < end ? block.mask : 0), first);
      split(masked(numbers + columns.pitch, at + 1 < end ? block.mask : 0), second);
      for (int i = 0; i < kPieces; ++i)
        _mm512_store_si512(tile + i * kTile + stage * 32, in_pairs(first[i], second[i]));
    } else {
      tile += (stage - 16) * kTile;
      __m512i rows[16];
      for (int p = 0; p < 16; ++p) rows[p] = _mm512_load_si512(tile + p * 32);
      transpose(rows);
      for (int p = 0; p < 16; ++p) _mm512_store_si512(tile + p * 32, rows[p]);
    }
    if (++stage == stages()) {
      stage = 0;
      if (++b == to) b = from, row += 32;
      block = columns[b];
    }
    return true;
  }
};

// ---- products ----

// Memory that is needed next, fetched a few lines at a time: all at once they would hinder the tiles' loads.
template <bool written>
struct Ahead {
  const char* row = nullptr;
  int64_t pitch = 0, lines = 0, rows = 0, each = 0, line = 0;

  Ahead() = default;
  // `rows` rows of `width` numbers, within `times` calls of fetch().
  Ahead(const float* first, int64_t pitch, int64_t width, int64_t rows, int64_t times)
      : row(reinterpret_cast<const char*>(first)), pitch(4 * pitch), lines((width + 15) / 16), rows(rows) {
    each = (lines * rows + times - 1) / times;
  }
  void fetch() {
    for (int64_t i = 0; i < each && rows > 0; ++i) {
      if constexpr (written)
        asm volatile("prefetchw (%0)" ::"r"(row + 64 * line));
      else
        asm volatile("prefetcht1 (%0)" ::"r"(row + 64 * line));
      if (++line == lines) line = 0, row += pitch, --rows;
    }
  }
};

// Tiles 0 to 3, the sums of two row tiles by two column tiles, go on over `steps` steps. A tile's steps follow
// each other; `across` is the way from the first row (column) tile to the second. Largest products last.
// meanwhile() is called kCalls times a step: the processor has time while the tiles multiply.
template <class F>
inline void multiply(const uint16_t* left, int64_t left_across, const uint16_t* right, int64_t right_across,
                     int64_t steps, F meanwhile) {
  const auto load_left = [&](int piece) {
    tile_load<4>(left + piece * kTile, 64);
    tile_load<5>(left + left_across + piece * kTile, 64);
  };
  const auto load_right = [&](int piece) {
    tile_load<6>(right + piece * kTile, 64);
    tile_load<7>(right + right_across + piece * kTile, 64);
  };
  const auto products = [&] {
    tile_product<0, 4, 6>();
    tile_product<1, 4, 7>();
    tile_product<2, 5, 6>();
    tile_product<3, 5, 7>();
    meanwhile();
  };
  for (int64_t s = 0; s < steps; ++s, left += kStep, right += kStep) {
    load_left(0), load_right(2), products();
    load_right(1), products();
    load_left(1), products();
    load_right(0), products();
    load_left(2), products();
    load_left(0), products();
  }
}

inline void zero_sums() {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
}
// (32, 32), with `pitch` numbers a row.
inline void load_sums(const float* from, int64_t pitch) {
  tile_load<0>(from, pitch * 4);
  tile_load<1>(from + 16, pitch * 4);
  tile_load<2>(from + 16 * pitch, pitch * 4);
  tile_load<3>(from + 16 * pitch + 16, pitch * 4);
}
inline void store_sums(float* to, int64_t pitch) {
  tile_store<0>(to, pitch * 4);
  tile_store<1>(to + 16, pitch * 4);
  tile_store<2>(to + 16 * pitch, pitch * 4);
  tile_store<3>(to + 16 * pitch + 16, pitch * 4);
}

// Steps at once, where there are `steps`: no more than kDeep, and about as many every time.
inline int64_t depth(int64_t steps) { return (steps + (steps - 1) / kDeep) / ((steps - 1) / kDeep + 1); }

// What multiplies a packed left side, (rows, steps [from, to) of all), by a packed weight,
// [block of out][step][piece], into rows [begin, end) of `out`: plus `start`, a number for every column of
// every block, or null, in its first steps, and plus what is there in later ones. Packs what comes next.
void multiply_rows(const uint16_t* left, const uint16_t* weight, const float* start, const Columns<float>& out, int64_t begin,
                   int64_t end, int64_t from, int64_t to, int64_t steps, Packing& next) {
  const int64_t tile_rows = (end - begin + 15) / 16, across = (to - from) * kStep, times = kCalls * (to - from);
  const int64_t calls = times * ((out.blocks() + 1) / 2) * ((tile_rows + 1) / 2), each = (next.remaining() + calls - 1) / calls;
  const bool large = out.blocks() * steps * kStep * 2 > 1 << 20;  // the weight: more than half a core's cache
  for (int64_t b = 0; b < out.blocks(); b += 2) {
    const Block<float> first = out[b], second = out[b + 1];
    const uint16_t* right = weight + (b * steps + from) * kStep;
    const bool side_by_side = (first.mask & second.mask) == 0xFFFF && second.first == first.first + 16;
    for (int64_t t = 0; t < tile_rows; t += 2) {
      alignas(64) float sums[32 * 32];
      const int64_t r = begin + 16 * t, rows = std::min<int64_t>(32, end - r);
      const bool in_place = side_by_side && rows == 32;
      float* at = first.first + r * out.pitch;
      if (from == 0) {
        start ? load_sums(start + 16 * b, 0) : zero_sums();
      } else if (in_place) {
        load_sums(at, out.pitch);
      } else {
        for (int64_t i = 0; i < rows; ++i) {
          _mm512_store_ps(sums + 32 * i, masked(first.first + (r + i) * out.pitch, first.mask));
          _mm512_store_ps(sums + 32 * i + 16, masked(second.first + (r + i) * out.pitch, second.mask));
        }
        load_sums(sums, 32);
      }
      Ahead<true> written;
      if (from == 0 && in_place) {
        const bool below = t + 4 <= tile_rows;
        written = {below ? at + 32 * out.pitch : out[b + 2].first + begin * out.pitch, out.pitch, 32, 32, times};
      }
      // the next two blocks' tiles, one block with each of the first two pairs of rows
      const float* panel = reinterpret_cast<const float*>(right + (t == 0 ? 2 : 3) * steps * kStep);
      Ahead<false> later(panel, 0, across / 2, large && t < 4 ? 1 : 0, times);
      // where there is no second row tile it is the first again: nobody stores it
      multiply(left + t * across, t + 1 < tile_rows ? across : 0, right, steps * kStep, to - from, [&] {
        written.fetch(), later.fetch();
        for (int64_t i = 0; i < each; ++i) next.one();
      });
      if (in_place) {
        store_sums(at, out.pitch);
        continue;
      }
      store_sums(sums, 32);
      for (int64_t i = 0; i < rows; ++i) {
        _mm512_mask_storeu_ps(first.first + (r + i) * out.pitch, first.mask, _mm512_load_ps(sums + 32 * i));
        _mm512_mask_storeu_ps(second.first + (r + i) * out.pitch, second.mask, _mm512_load_ps(sums + 32 * i + 16));
      }
    }
  }
  next.rest();
}

// Rows [begin, end) of out(g) = in(g) times group g's packed weight, which takes `size` numbers, plus start(g).
template <class In, class Out, class Start>
void rows_product(int64_t groups, In in, Out out, Start start, const uint16_t* packed, int64_t size, int64_t begin, int64_t end) {
  const Tiles tiles;
  const int64_t steps = steps_of(in(0).blocks()), deep = depth(steps), depths = (steps + deep - 1) / deep;
  const int64_t most = out(0).blocks() > 64 ? kMostRows / 2 : kMostRows;  // sums have to stay in the cache, too
  const int64_t turns = (end - begin + most - 1) / most;
  const int64_t turn = ((end - begin) / std::max<int64_t>(1, turns) + 31) / 32 * 32, size_of_left = turn / 16 * deep * kStep;
  const Buffer<uint16_t> both = allocate<uint16_t>(2 * size_of_left);
  const int64_t works = (end - begin + turn - 1) / turn * groups * depths;
  const auto packing = [&](int64_t work) {
    if (work == works) return Packing();
    const int64_t r = begin + work / (groups * depths) * turn, from = work % depths * deep;
    uint16_t* to = both.get() + work % 2 * size_of_left;
    return Packing(in(work / depths % groups), r, std::min(end, r + turn), from, std::min(steps, from + deep), to);
  };
  Packing now = packing(0);
  now.rest();
  for (int64_t work = 0; work < works; ++work) {
    Packing next = packing(work + 1);
    const int64_t r = begin + work / (groups * depths) * turn, g = work / depths % groups, from = work % depths * deep;
    multiply_rows(now.to, packed + g * size, start(g), out(g), r, std::min(end, r + turn), from, std::min(steps, from + deep),
                  steps, next);
    now = next;
  }
}

// The product over rows [begin, end) for one group and blocks [first, last) of its outputs:
// (out blocks * 16, in blocks * 16), even numbers of blocks.
void weight_part(const LinearBackward& call, int64_t group, int64_t first, int64_t last, int64_t begin, int64_t end, float* sum) {
  constexpr int64_t kRows = 32 * kDeep, across = kDeep * kStep;
  const auto x = inputs(call, floats(call.x), floats(call.m), group);
  const auto grad = outputs(call, floats(call.grad), group);
  const int64_t tall = last - first, broad = even(x.blocks()), pitch = broad * 16;
  const int64_t panels = (broad + kPanel - 1) / kPanel, works = (end - begin + kRows - 1) / kRows * panels;
  const int64_t left_size = tall * across, right_size = std::min(kPanel, broad) * across;
  const Buffer<uint16_t> left = allocate<uint16_t>(2 * left_size), right = allocate<uint16_t>(2 * right_size);
  struct Both {
    RowPacking grad, x;
    bool one() { return grad.one() || x.one(); }
  };
  // rows by panels of x's blocks; the gradient's tiles serve all panels
  const auto packing = [&](int64_t work) {
    if (work == works) return Both{{grad}, {x}};
    const int64_t chunk = work / panels, panel = work % panels * kPanel;
    const int64_t r = begin + chunk * kRows, to = std::min(end, r + kRows);
    return Both{{grad, first, panel == 0 ? last : first, r, to, true, left.get() + chunk % 2 * left_size},
                {x, panel, std::min(broad, panel + kPanel), r, to, false, right.get() + work % 2 * right_size}};
  };
  for (Both start = packing(0); start.one();) continue;
  alignas(64) float sums[32 * 32];
  for (int64_t work = 0; work < works; ++work) {
    const Both now = packing(work);
    const int64_t steps = (now.x.end - now.x.begin + 31) / 32;
    const uint16_t* grad_tiles = left.get() + work / panels % 2 * left_size;
    Both next = packing(work + 1);
    const int64_t calls = kCalls * steps * (tall / 2) * ((now.x.to - now.x.from) / 2);
    const int64_t each = (next.grad.count() + next.x.count() + calls - 1) / calls;
    for (int64_t a = 0; a < tall; a += 2)
      for (int64_t b = now.x.from; b < now.x.to; b += 2) {
        float* at = sum + (first + a) * 16 * pitch + b * 16;
        zero_sums();
        multiply(grad_tiles + a * across, across, now.x.packed + (b - now.x.from) * across, across, steps, [&] {
          for (int64_t i = 0; i < each; ++i) next.one();
        });
        if (now.x.begin == begin) {
          store_sums(at, pitch);
          continue;
        }
        // added here: tiles that went on from the last sum would round to it six times every 32 rows
        store_sums(sums, 32);
        for (int i = 0; i < 32; ++i)
          for (int h = 0; h < 32; h += 16) {
            float* row = at + i * pitch + h;
            _mm512_storeu_ps(row, _mm512_add_ps(_mm512_loadu_ps(row), _mm512_load_ps(sums + 32 * i + h)));
          }
      }
    while (next.one()) continue;
  }
}

int64_t in_blocks(const LinearCall& call) { return blocks_of(call.in) * call.sides; }

// Rows of a part of dweight: by the shape alone, so that sums have one order however many threads there are.
int64_t part_rows(const LinearCall& call) {
  const int64_t parts = std::clamp<int64_t>((call.rows + kPartRows - 1) / kPartRows, 1, kParts);
  return std::max<int64_t>(1, (call.rows + parts - 1) / parts);
}

}  // namespace

bool available() {
  unsigned a, b, c, d;
  __cpuid_count(7, 0, a, b, c, d);
  constexpr unsigned bfloat16 = 1u << 22, tiles = 1u << 24;
  if (!(d & bfloat16) || !(d & tiles)) return false;
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

int64_t linear_chunk() { return 32; }  // two tiles of rows

int64_t linear_units(const LinearCall& call, bool transposed) {
  const int64_t in = in_blocks(call), out = blocks_of(call.out);
  return call.groups * (transposed ? even(in) * steps_of(out) : even(out) * steps_of(in));
}
int64_t linear_packed(const LinearCall& call, bool transposed) {
  return linear_units(call, transposed) * kStep * static_cast<int64_t>(sizeof(uint16_t));
}

void linear_pack(const LinearCall& call, bool transposed, void* packed, int64_t begin, int64_t end) {
  const int64_t in = in_blocks(call), out = blocks_of(call.out);
  const int64_t blocks = even(transposed ? in : out), steps = steps_of(transposed ? out : in);
  for (int64_t t = begin; t < end; ++t)
    pack_weight(call, transposed, t / (blocks * steps), t / steps % blocks, t % steps,
                static_cast<uint16_t*>(packed) + t * kStep);
}

void linear(const LinearForward& call, const void* packed, int64_t begin, int64_t end) {
  const int64_t padded = even(blocks_of(call.out)) * 16;
  const Buffer<float> starts = allocate<float>(call.groups * padded);
  std::fill_n(starts.get(), call.groups * padded, 0.0f);
  if (call.bias)
    for (int64_t g = 0; g < call.groups; ++g) std::copy_n(call.bias + g * call.out, call.out, starts.get() + g * padded);
  rows_product(
      call.groups, [&](int64_t g) { return inputs(call, floats(call.x), floats(call.m), g); },
      [&](int64_t g) { return outputs(call, floats(call.y), g); },
      [&](int64_t g) { return call.bias ? starts.get() + g * padded : nullptr; },
      static_cast<const uint16_t*>(packed), linear_units(call, false) / call.groups * kStep, begin, end);
}

void linear_input_gradient(const LinearBackward& call, const void* packed, int64_t begin, int64_t end) {
  rows_product(
      call.groups, [&](int64_t g) { return outputs(call, floats(call.grad), g); },
      [&](int64_t g) { return inputs(call, floats(call.dx), floats(call.dm), g); }, [](int64_t) { return nullptr; },
      static_cast<const uint16_t*>(packed), linear_units(call, true) / call.groups * kStep, begin, end);
}

int64_t linear_parts(const LinearCall& call) { return call.groups * ((call.rows + part_rows(call) - 1) / part_rows(call)); }
int64_t linear_part_size(const LinearCall& call) { return even(blocks_of(call.out)) * even(in_blocks(call)) * 256; }
int64_t linear_part_units(const LinearCall& call) { return (even(blocks_of(call.out)) + kPanel - 1) / kPanel; }

void linear_weight_parts(const LinearBackward& call, float* parts, int64_t begin, int64_t end) {
  const Tiles tiles;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t part = unit / linear_part_units(call), first = unit % linear_part_units(call) * kPanel;
    const int64_t row = part / call.groups * part_rows(call);
    weight_part(call, part % call.groups, first, std::min(first + kPanel, even(blocks_of(call.out))), row,
                std::min(call.rows, row + part_rows(call)), parts + part * linear_part_size(call));
  }
}

void linear_weight_merge(const LinearBackward& call, const float* parts, int64_t begin, int64_t end) {
  const int64_t half = blocks_of(call.in) * 16, pitch = even(in_blocks(call)) * 16, count = linear_parts(call);
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

}  // namespace fer::cpu::tiles
#endif
