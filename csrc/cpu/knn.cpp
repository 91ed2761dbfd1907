// knn on the CPU. Compiled once for every instruction set (see simd.h).
//
// The distances of a few query rows to a block of keys come from a register-tiled product over
// packed keys and go to a buffer that stays in the first-level cache; each row of it is filtered
// against the row's worst kept distance at once, so that no N x M array exists and the selection
// touches few candidates.
//
// Selection sorts nothing. The rank of a candidate is the number of candidates before it, counted
// a vector at a time: no branches, no chain of dependences, and n²/lanes steps for the n of a
// few dozen that pass the filter.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>

#include "product.h"

namespace fer::cpu::FER_ISA {
namespace {

constexpr int kSweep = 256;                             // keys between two looks at the candidates
constexpr int kCandidates = kSweep + kMaxNeighbours + 16;
constexpr int64_t kBlockBytes = 640 << 10;  // packed keys a thread holds at once: most of a level-2 cache
constexpr int64_t kRowsAtOnce = 16 * kRows;  // rows that share a packed block where the keys take several

// Distances stay floats until a rank is counted; as signed integers they have a total order:
// -0 equals +0 and every NaN is the largest.
template <class A>
inline Vec<Int<A>> ordered(Vec<A> d) {
  using I = Vec<Int<A>>;
  const I bits = reinterpret_cast<I>(d + A(0));
  const I key = bits ^ ((bits >> (8 * sizeof(A) - 1)) & std::numeric_limits<Int<A>>::max());
  const I is_nan = d != d;
  return (key & ~is_nan) | (is_nan & std::numeric_limits<Int<A>>::max());
}

template <class A>
struct Scale {
  A inverse_norm;  // 1 without normalize; NaN in any case where the squared norm is not finite
  A square;        // |x̂|²
};

template <class A, class T>
Scale<A> row_scale(const T* row, int64_t channels, bool normalize) {
  Vec<A> sums[4] = {};  // enough chains to hide the latency of an addition
  int64_t c = 0;
  for (; c + 4 * kLanes<A> <= channels; c += 4 * kLanes<A>)
    for (int i = 0; i < 4; i += 2) {
      const Pair<A> v = load_pair_as<A>(row + c + i * kLanes<A>);
      sums[i] += v.first * v.first;
      sums[i + 1] += v.second * v.second;
    }
  for (; c + kLanes<A> <= channels; c += kLanes<A>) {
    const Vec<A> v = load_as<A>(row + c);
    sums[0] += v * v;
  }
  A square = total<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; c < channels; ++c) square += widen<A>(row[c]) * widen<A>(row[c]);
  A inverse = normalize ? A(1) / std::max(std::sqrt(square), A(1e-12)) : A(1);
  if (normalize && square < A(1e-24)) {  // squares so small may have been lost before the scale lifts them
    square = 0;
    for (c = 0; c < channels; ++c) square += (widen<A>(row[c]) * inverse) * (widen<A>(row[c]) * inverse);
    return {inverse, square};
  }
  if (!std::isfinite(square)) inverse = std::numeric_limits<A>::quiet_NaN();
  return {inverse, square * inverse * inverse};
}

// ---- the product ----

template <class A>
struct Tile {
  const A* queries;     // packed [channels][kPackedRows]
  const A* keys;        // packed [channels][V * lanes]
  const A* key_square;  // |ŷ|²
  int64_t channels;
  A* distances;     // [rows][kSweep]
};

template <class A, int R, int V>
void distances_tile(const Tile<A>& t) {
  product_tile<A, R, V, 1, kPackedRows>(
      t.queries, t.keys, V * kLanes<A>, t.channels, nullptr, [&](int r, int v, Vec<A> sum) {
        store(t.distances + r * kSweep + v * kLanes<A>, load(t.key_square + v * kLanes<A>) - A(2) * sum);
      });
}

template <class A, int V>
void distances_tile(const Tile<A>& t, int rows) {
  using Function = void (*)(const Tile<A>&);
  static constexpr auto table = []<int... R>(std::integer_sequence<int, R...>) {
    struct {
      Function of[sizeof...(R)];
    } functions{{&distances_tile<A, R + 1, V>...}};
    return functions;
  }(std::make_integer_sequence<int, kRows>{});
  table.of[rows - 1](t);
}

// ---- selection ----

// ranks[i] = how many candidates come before candidate i by (distance, position in the list).
// Candidates stand in ascending order of index, so ties go to the lowest.
template <class A>
void count_ranks(const A* values, int n, Int<A>* keys, Int<A>* ranks) {
  using I = Int<A>;
  constexpr int lanes = kLanes<A>;
  Vec<I> lane;
  for (int l = 0; l < lanes; ++l) lane[l] = l;
  for (int i = 0; i < n; i += lanes) store(keys + i, ordered<A>(load(values + i)));
  for (int i = 0; i < n; i += lanes) {
    const Vec<I> mine = load(keys + i);
    Vec<I> rank = {};
    const int diagonal_end = std::min(i + lanes, n);
    for (int j = 0; j < i; ++j) rank = count_le<I, I>(rank, splat(keys[j]), mine);
    for (int j = i; j < diagonal_end; ++j) {
      const Vec<I> other = splat(keys[j]);
      rank = count_lt<I, I>(rank, other, mine);
      rank -= (other == mine) & (lane > splat<I>(j - i));
    }
    for (int j = diagonal_end; j < n; ++j) rank = count_lt<I, I>(rank, splat(keys[j]), mine);
    store(ranks + i, rank);
  }
}

// A value that at least `wanted` of the row's distances do not exceed, and few more: the wanted-th
// smallest among the minima of disjoint groups. NaN where there is none.
template <class A>
A first_bound(const A* row, int width, int wanted) {
  constexpr int lanes = kLanes<A>;
  const int vectors = (width + lanes - 1) / lanes;
  // Half again as many groups as wanted keeps the bound tight; more only cost comparisons.
  const int groups = std::min((wanted * 3 / 2 + lanes - 1) / lanes, vectors);
  alignas(64) A minima[kMaxNeighbours * 3 / 2 + lanes];
  for (int g = 0; g < groups; ++g) {
    Vec<A> low = load(row + g * lanes);
    for (int v = g + groups; v < vectors; v += groups) low = smaller<A>(load(row + v * lanes), low);
    store(minima + g * lanes, low);
  }
  const A infinity = std::numeric_limits<A>::infinity();
  Vec<A> best = splat(infinity);
  for (int g = 0; g < groups; ++g) {
    Vec<Int<A>> rank = {};
    const Vec<A> mine = load(minima + g * lanes);
    for (int j = 0; j < groups * lanes; ++j) rank = count_le<A, Int<A>>(rank, splat(minima[j]), mine);
    const Vec<A> value = rank >= splat<Int<A>>(wanted) ? mine : splat(infinity);
    best = smaller<A>(value, best);
  }
  const A bound = least<A>(best);
  // The filter is strict, so the bound must lie a little above.
  const A above = bound + std::abs(bound) * std::numeric_limits<A>::epsilon() + std::numeric_limits<A>::min();
  return above < infinity ? above : std::numeric_limits<A>::quiet_NaN();
}

template <class A>
struct Candidates {  // one row's work list; a vector may be written beyond the last entry
  alignas(64) A value[kCandidates];
  alignas(64) int32_t index[kCandidates];
  alignas(64) Int<A> key[kCandidates];
  alignas(64) Int<A> rank[kCandidates];
  int count = 0;

  // Keys pass where not (distance >= bound): equal distances later in index cannot enter.
  void offer(const A* row, int width, int first_index, A bound) {
    constexpr int lanes = kLanes<A>;
    const Vec<A> limit = splat(bound);
    int i = 0, n = count;
    for (; i + lanes <= width; i += lanes) {
      const Vec<A> d = load(row + i);
      n += append<A>(below_or_nan<A>(d, limit), d, first_index + i, value + n, index + n);
    }
    if (i < width) {
      const Vec<A> d = load(row + i);
      const uint32_t valid = (1u << (width - i)) - 1;
      n += append<A>(below_or_nan<A>(d, limit) & valid, d, first_index + i, value + n, index + n);
    }
    count = n;
  }

  // Drops all but the nearest `wanted`, keeping their order; returns the distance of the last of them.
  A keep_nearest(int wanted) {
    count_ranks<A>(value, count, key, rank);
    A worst = std::numeric_limits<A>::quiet_NaN();
    int kept = 0;
    for (int i = 0; i < count; ++i) {
      if (rank[i] == wanted - 1) worst = value[i];
      value[kept] = value[i];
      index[kept] = index[i];
      kept += rank[i] < wanted;
    }
    count = kept;
    return worst;
  }
};

// What a row keeps between two blocks of keys.
template <class A>
struct Kept {
  A value[kMaxNeighbours];
  int32_t index[kMaxNeighbours];
  int count;
  A bound;
};

// ---- one thread's rows ----

template <class A, class T>
class Worker {
 public:
  explicit Worker(const KnnCall& call)
      : call_(call),
        wanted_(call.k * call.dilation),
        key_data_(static_cast<const T*>(call.y ? call.y : call.x)),
        block_keys_(std::max<int64_t>(kBlockBytes / sizeof(A) / std::max<int64_t>(call.channels, 1), 1)) {
    // Whole sweeps, so that every block but the last ends on a vector.
    block_keys_ = std::max<int64_t>(block_keys_ / kPanel * kPanel, kPanel);
    one_block_ = block_keys_ >= call.keys;
    if (one_block_) block_keys_ = call.keys;
    const int64_t padded = (block_keys_ + kPanel - 1) / kPanel * kPanel;
    packed_keys_ = allocate<A>(padded * call.channels);
    key_square_ = allocate<A>(padded);
    key_scale_ = allocate<A>(padded);
    packed_queries_ = allocate<A>(kPackedRows * call.channels);
    distances_ = allocate<A>(kRows * kSweep);
    work_ = std::make_unique<Candidates<A>>();
    if (!one_block_) kept_ = std::make_unique<Kept<A>[]>(kRowsAtOnce);
    for (int s = 0; s < call.k; ++s) slots_[s] = call.ranks ? static_cast<int>(call.ranks[s]) : s * call.dilation;
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t b = begin / call_.queries; b * call_.queries < end; ++b) {
      const int64_t first = std::max(begin - b * call_.queries, int64_t(0));
      const int64_t last = std::min(end - b * call_.queries, call_.queries);
      const int64_t step = one_block_ ? kRows : kRowsAtOnce;
      for (int64_t row = first; row < last; row += step) rows(b, row, std::min(row + step, last));
    }
  }

 private:
  static constexpr int kPanel = 2 * kLanes<A>;
  // The last few keys go to a panel of half the width, unless that is less than pack() can fill.
  static constexpr int panel_width(int keys) { return keys <= kLanes<A> && kLanes<A> >= 4 ? kLanes<A> : kPanel; }

  void pack_keys(int64_t b, int64_t first, int64_t last) {
    if (packed_batch_ == b && packed_first_ == first) return;
    packed_batch_ = b;
    packed_first_ = first;
    const T* rows[kPanel];
    for (int64_t j = first; j < last; j += kPanel) {
      const int count = static_cast<int>(std::min<int64_t>(kPanel, last - j));
      const int pitch = panel_width(count);
      A* scale = key_scale_.get() + j - first;
      A* square = key_square_.get() + j - first;
      point_at(key_data_ + (b * call_.keys + j) * call_.channels, call_.channels, count, pitch, rows);
      for (int r = 0; r < count; ++r) {
        const Scale<A> of_row = row_scale<A>(rows[r], call_.channels, call_.normalize);
        scale[r] = of_row.inverse_norm;
        square[r] = of_row.square;
      }
      // Padding becomes NaN distances, which no bound is taken from.
      for (int r = count; r < pitch; ++r) scale[r] = 1, square[r] = std::numeric_limits<A>::quiet_NaN();
      pack<A>(rows, scale, call_.channels, pitch, packed_keys_.get() + (j - first) * call_.channels);
    }
  }

  void rows(int64_t b, int64_t first, int64_t last) {
    for (int64_t block = 0; block < call_.keys; block += block_keys_) {
      const int64_t block_end = std::min(block + block_keys_, call_.keys);
      pack_keys(b, block, block_end);
      for (int64_t row = first; row < last; row += kRows)
        tile(b, row, static_cast<int>(std::min<int64_t>(kRows, last - row)), block, block_end, row - first);
    }
  }

  // Rows [row, row + count) against keys [block, block_end).
  void tile(int64_t b, int64_t row, int count, int64_t block, int64_t block_end, int64_t kept_row) {
    const T* from[kPackedRows];
    A scale[kPackedRows], square[kPackedRows];
    point_at(static_cast<const T*>(call_.x) + (b * call_.queries + row) * call_.channels, call_.channels, count,
             kPackedRows, from);
    const bool known = one_block_ && !call_.y;  // these rows were keys a moment ago
    std::fill_n(scale, kPackedRows, A(1));
    for (int r = 0; r < count; ++r) {
      const Scale<A> of_row = known ? Scale<A>{key_scale_[row + r], key_square_[row + r]}
                                   : row_scale<A>(from[r], call_.channels, call_.normalize);
      scale[r] = of_row.inverse_norm;
      square[r] = of_row.square;
    }
    pack<A>(from, scale, call_.channels, kPackedRows, packed_queries_.get());

    // Where one sweep holds all keys, a row is finished from the buffer and nothing is kept.
    const bool single = one_block_ && call_.keys <= kSweep;
    Kept<A> local[kRows];
    Kept<A>* kept = one_block_ ? local : kept_.get() + kept_row;
    if (block == 0 && !single)
      for (int r = 0; r < count; ++r) kept[r].count = 0, kept[r].bound = std::numeric_limits<A>::quiet_NaN();

    for (int64_t j = block; j < block_end; j += kSweep) {
      const int width = static_cast<int>(std::min<int64_t>(kSweep, block_end - j));
      sweep_distances(j - block, width, count);
      for (int r = 0; r < count; ++r) {
        A* d = distances_.get() + r * kSweep;
        if (call_.bias) add_bias(d, b, row + r, j, width);
        work_->count = 0;
        A bound = std::numeric_limits<A>::quiet_NaN();
        if (!single) {
          work_->count = kept[r].count;
          std::copy_n(kept[r].value, kept[r].count, work_->value);
          std::copy_n(kept[r].index, kept[r].count, work_->index);
          bound = kept[r].bound;
        }
        if (work_->count == 0) bound = first_bound(d, width, wanted_);
        work_->offer(d, width, static_cast<int>(j), bound);
        if (j + width == call_.keys) {
          finish(b * call_.queries + row + r, square[r]);
        } else if (work_->count > kept[r].count) {
          if (work_->count >= wanted_) kept[r].bound = work_->keep_nearest(wanted_);
          kept[r].count = work_->count;
          std::copy_n(work_->value, work_->count, kept[r].value);
          std::copy_n(work_->index, work_->count, kept[r].index);
        }
      }
    }
  }

  void sweep_distances(int64_t first, int width, int rows) {
    for (int j = 0; j < width; j += kPanel) {
      const Tile<A> t{packed_queries_.get(), packed_keys_.get() + (first + j) * call_.channels,
                      key_square_.get() + first + j, call_.channels, distances_.get() + j};
      if (panel_width(width - j) == kPanel)
        distances_tile<A, 2>(t, rows);
      else
        distances_tile<A, 1>(t, rows);
    }
  }

  void add_bias(A* d, int64_t b, int64_t row, int64_t first, int width) const {
    const int64_t offset = b * call_.bias_stride[0] + row * call_.bias_stride[1] + first * call_.bias_stride[2];
    if (call_.bias_dtype == call_.dtype)
      add_bias(d, static_cast<const T*>(call_.bias) + offset, width);
    else
      add_bias(d, static_cast<const float*>(call_.bias) + offset, width);
  }
  template <class S>
  void add_bias(A* d, const S* from, int width) const {
    const int64_t stride = call_.bias_stride[2];
    if (stride == 1)
      for (int i = 0; i < width; ++i) d[i] += bias_value(from[i]);
    else
      for (int i = 0; i < width; ++i) d[i] += bias_value(from[i * stride]);
  }
  template <class S>
  static A bias_value(S value) {
    if constexpr (std::is_same_v<S, float>)
      return value;  // also the bias of a float64 call
    else
      return widen<A>(value);
  }

  void finish(int64_t row, A square) {
    Candidates<A>& w = *work_;
    count_ranks<A>(w.value, w.count, w.key, w.rank);
    // The order buffers take a rank each, kept or not: cheaper than a branch that cannot be predicted.
    for (int i = 0; i < w.count; ++i) order_[w.rank[i]] = i;
    for (int s = 0; s < call_.k; ++s) {
      const int i = order_[slots_[s]];
      call_.idx[row * call_.k + s] = w.index[i];
      if (call_.dist) static_cast<A*>(call_.dist)[row * call_.k + s] = w.value[i] + square;
    }
  }

  const KnnCall& call_;
  const int wanted_;
  const T* key_data_;
  int64_t block_keys_;
  bool one_block_;
  int64_t packed_batch_ = -1, packed_first_ = -1;
  Buffer<A> packed_keys_, key_square_, key_scale_, packed_queries_, distances_;
  std::unique_ptr<Candidates<A>> work_;
  std::unique_ptr<Kept<A>[]> kept_;
  int slots_[kMaxNeighbours];
  int order_[kCandidates];
};

}  // namespace

void knn(const KnnCall& call, int64_t begin, int64_t end) {
  with_types(call.dtype, [&](auto accumulator, auto element) {
    Worker<decltype(accumulator), decltype(element)>(call).run(begin, end);
  });
}

}  // namespace fer::cpu::FER_ISA
