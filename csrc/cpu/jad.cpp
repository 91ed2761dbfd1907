// jad on the CPU. Compiled once for every instruction set (see simd.h).
//
// Scores are computed transposed: a panel holds the scores of as many queries as two vectors have lanes, one
// row a key. Maximum, exponential and sums of the softmax then run down the rows without a sum across
// lanes, and a key's column mean is one row. Both products of attention, and all five of its gradient, are the
// one product_tile() with different strides, and no operand is ever transposed in memory.
//
// Where the powers of all queries of a head fit the cache they are kept (kKeptBytes), so that dropping costs
// a look at the column sums and less work afterwards: dropped keys are left out of the product with the values.
// Otherwise a first pass finds the column means, and a second one computes the scores again.
#include "kernels.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "product.h"

namespace fer::cpu::FER_ISA {
namespace {

constexpr int64_t kKeptBytes = 1 << 20;  // powers of one head: with its keys and values, a level-2 cache
constexpr int64_t kChunkQueries = 512;   // queries of a unit where powers are not kept
constexpr int64_t kKeyBlock = 128;       // keys summed in one chain: longer ones err more, and rows stay in the cache
constexpr int64_t kSumBlock = 32;        // the same for the sums of a row's powers
constexpr int kFew = 4;                  // so few queries are multiplied channel by channel
constexpr double kLostPowers = 1e-25;    // a kept sum below this may have lost powers to underflow

template <class A>
constexpr int kPanel = 2 * kLanes<A>;  // queries of a panel, and the row pitch of what belongs to it
template <class A>
constexpr int kPanelTile = kPanel<A> / 4;  // queries whose outputs are computed together
template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// f(0) + f(1) + ... f(count - 1). One long chain would lose more than all the products of attention do, and a
// wrong total is wrong for a whole row.
template <class A, class F>
Vec<A> blocked_sum(int64_t count, F f) {
  Vec<A> sum = {};
  for (int64_t begin = 0; begin < count; begin += kSumBlock) {
    const int64_t end = std::min(begin + kSumBlock, count);
    Vec<A> part = {};
    for (int64_t n = begin; n < end; ++n) part += f(n);
    sum += part;
  }
  return sum;
}

constexpr int64_t padded_rows(int64_t rows) { return (rows + kRows - 1) / kRows * kRows; }

// Calls f with the smallest tile height that holds `rows`.
template <class F>
void with_rows(int64_t rows, F f) {
  if (rows > kRows / 2 + 1) return f(std::integral_constant<int, kRows>{});
  if (rows > 2) return f(std::integral_constant<int, kRows / 2 + 1>{});
  f(std::integral_constant<int, 2>{});
}

// Calls f(vectors, c) for the tiles of one or two vectors that make up a row of `width`.
template <class A, class F>
void for_each_column_tile(int64_t width, F f) {
  int64_t c = 0;
  for (; c + kPanel<A> <= width; c += kPanel<A>) f(std::integral_constant<int, 2>{}, c);
  if (c < width) f(std::integral_constant<int, 1>{}, c);
}

// ---- operands ----

// Rows of a matrix in one of the two forms that product_tile takes.
template <class A, class T>
struct Rows {
  const T* data;
  int64_t count, width;
  const int32_t* chosen;  // null, or which rows of data

  const T* row(int64_t i) const { return data + (chosen ? chosen[i] : i) * width; }

  // Tiles of kRows rows, width * kPackedRows numbers each.
  void to_tiles(A* tiles) const {
    A ones[kPackedRows];
    std::fill_n(ones, kPackedRows, A(1));
    const T* rows[kPackedRows];
    for (int64_t first = 0; first < count; first += kRows, tiles += width * kPackedRows) {
      for (int r = 0; r < kPackedRows; ++r) rows[r] = row(std::min(first + std::min(r, kRows - 1), count - 1));
      pack<A>(rows, ones, width, kPackedRows, tiles);
    }
  }

  // Row-major, rows filled up with zeros. Where the data is that already, the data itself.
  const A* to_matrix(Buffer<A>& matrix) const {
    if constexpr (std::is_same_v<A, T>)
      if (!chosen && width == padded<A>(width)) return data;
    const int64_t pitch = padded<A>(width);
    if (!matrix) matrix = allocate<A>(std::max<int64_t>(capacity(), 1) * pitch);
    for (int64_t i = 0; i < count; ++i) load_row(row(i), width, pitch, matrix.get() + i * pitch);
    return matrix.get();
  }
  int64_t most = 0;  // rows that a buffer must hold, where later heads may choose more
  int64_t capacity() const { return std::max(most, count); }
};

// A panel's queries, packed, pitch kPanel. Lanes beyond `count` repeat the last query.
template <class A, class T>
void pack_panel(const T* rows, int64_t width, int count, A* panel) {
  const T* from[kPanel<A>];
  A ones[kPanel<A>];
  std::fill_n(ones, kPanel<A>, A(1));
  point_at(rows, width, count, kPanel<A>, from);
  pack<A>(from, ones, width, kPanel<A>, panel);
}

// products[key * kPanel + query] for the keys of tiles and the queries of a panel, times scale. A scale in the
// queries would cost a rounding of each of their numbers.
template <class A>
void panel_products(const A* tiles, int64_t keys, const A* panel, int64_t width, int count, A scale, A* products) {
  for (int64_t first = 0; first < keys; first += kRows, tiles += width * kPackedRows)
    with_rows(std::min<int64_t>(keys - first, kRows), [&](auto rows) {
      A* to = products + first * kPanel<A>;
      const auto done = [&](int r, int v, Vec<A> sum) { store(to + r * kPanel<A> + v * kLanes<A>, sum * scale); };
      if (count > kLanes<A>)
        product_tile<A, rows, 2, 1, kPackedRows>(tiles, panel, kPanel<A>, width, nullptr, done);
      else
        product_tile<A, rows, 1, 1, kPackedRows>(tiles, panel, kPanel<A>, width, nullptr, done);
    });
}

// The same for up to kFew queries, whose lanes would be nearly empty: a vector holds channels, and as many keys
// times kFew queries as there are lanes are summed at once. No key is packed.
template <class A>
void few_products(const A* keys, int64_t count, const A* queries, int64_t pitch, A scale, A* products) {
  if constexpr (kLanes<A> >= kFew) {
    constexpr int together = kLanes<A> / kFew;
    for (int64_t first = 0; first < count; first += together) {
      Vec<A> parts[kLanes<A>] = {};
      for (int64_t c = 0; c < pitch; c += kLanes<A>) {
        Vec<A> query[kFew];
        for (int i = 0; i < kFew; ++i) query[i] = load(queries + i * pitch + c);
#pragma GCC unroll 16
        for (int t = 0; t < kLanes<A>; ++t)
          parts[t] += load(keys + std::min(first + t / kFew, count - 1) * pitch + c) * query[t % kFew];
      }
      const Vec<A> sums = total_of_each<A>(parts) * scale;
      // The other lanes repeat the four queries: whatever is computed from them is finite, and not looked at.
      [&]<int... g>(std::integer_sequence<int, g...>) {
        ((first + g < count ? store(products + (first + g) * kPanel<A>, repeated<A, g>(sums)) : void()), ...);
      }(std::make_integer_sequence<int, together>{});
    }
  }
}

// A head's rows (keys or values), to be multiplied with panels of queries.
template <class A, class T>
class Factor {
 public:
  Factor(int64_t rows, int64_t width, int64_t queries)
      : width_(width), pitch_(padded<A>(width)), few_(queries <= kFew && kLanes<A> >= kFew),
        tiles_(allocate<A>(few_ ? 0 : padded_rows(rows) / kRows * width * kPackedRows)),
        panel_(allocate<A>(few_ ? kFew * pitch_ : width * kPanel<A>)) {}

  void enter(Rows<A, T> rows) {
    keys_ = rows.count;
    if (few_)
      matrix_ = rows.to_matrix(copy_);
    else
      rows.to_tiles(tiles_.get());
  }

  // products[key * kPanel + query] = key . query * scale
  void times(const T* queries, int count, A scale, A* products) {
    if (few_) {
      for (int i = 0; i < kFew; ++i)
        load_row(queries + std::min(i, count - 1) * width_, width_, pitch_, panel_.get() + i * pitch_);
      return few_products(matrix_, keys_, panel_.get(), pitch_, scale, products);
    }
    pack_panel(queries, width_, count, panel_.get());
    panel_products(tiles_.get(), keys_, panel_.get(), width_, count, scale, products);
  }

 private:
  const int64_t width_, pitch_;
  const bool few_;
  int64_t keys_ = 0;
  const A* matrix_ = nullptr;
  Buffer<A> tiles_, panel_, copy_;
};

// out[query * pitch + c] = Σ_key powers[key * kPanel + query] * matrix[key * pitch + c], over all keys or the chosen.
template <class A>
void weighted_rows(const A* powers, int64_t keys, const int32_t* chosen, const A* matrix, int64_t pitch, int count,
                   A* out) {
  for (int64_t block = 0; block < keys; block += kKeyBlock) {
    const int64_t steps = std::min(kKeyBlock, keys - block);
    // The chosen are counted from the matrix's first row, the others from the block's.
    const A* left = chosen ? powers : powers + block * kPanel<A>;
    const A* right = chosen ? matrix : matrix + block * pitch;
    for_each_column_tile<A>(pitch, [&](auto vectors, int64_t c) {
      for (int first = 0; first < count; first += kPanelTile<A>) {
        const auto done = [&](int r, int v, Vec<A> sum) {
          A* to = out + (first + r) * pitch + c + v * kLanes<A>;
          store(to, block == 0 ? sum : load(to) + sum);
        };
        if (chosen)
          product_tile<A, kPanelTile<A>, vectors, 1, kPanel<A>, true>(left + first, right + c, pitch, steps,
                                                                      chosen + block, done);
        else
          product_tile<A, kPanelTile<A>, vectors, 1, kPanel<A>>(left + first, right + c, pitch, steps, nullptr, done);
      }
    });
  }
  if (keys == 0) std::fill_n(out, count * pitch, A(0));
}

// put(key, c, a vector of Σ_query values[key * kPanel + query] * matrix[query * pitch + c])
template <class A, class Put>
void weighted_queries(const A* values, int64_t keys, const A* matrix, int64_t pitch, int count, Put put) {
  for (int64_t first = 0; first < keys; first += kRows)
    with_rows(std::min<int64_t>(keys - first, kRows), [&](auto rows) {
      for_each_column_tile<A>(pitch, [&](auto vectors, int64_t c) {
        product_tile<A, rows, vectors, kPanel<A>, 1>(values + first * kPanel<A>, matrix + c, pitch, count, nullptr,
                                                     [&](int r, int v, Vec<A> sum) {
                                                       put(first + r, c + v * kLanes<A>, sum);
                                                     });
      });
    });
}

// ---- what to drop ----

// Decided in double from the rounded column means: every backend that has the same means drops the same.
template <class A>
class Choice {
 public:
  explicit Choice(const JadForward& call) : call_(call), joint_(call.keys), levels_(call.keys), order_(call.keys) {}

  bool is_open(int64_t head) const { return call_.queries >= 2 && (!call_.gate || call_.gate[head]); }

  // means: (B, H, M). What is asked from here on is about `head`.
  void look_at(const A* means, int64_t head) {
    const int64_t heads = call_.joint_over_head ? call_.heads : 1;
    const A* from = means + (call_.joint_over_head ? head / heads * heads : head) * call_.keys;
    for (int64_t j = 0; j < call_.keys; ++j) {
      double sum = 0;
      for (int64_t h = 0; h < heads; ++h) sum += from[h * call_.keys + j];
      joint_[j] = sum / heads;
    }
    double mean = 0, square = 0;
    for (const double c : joint_) mean += c;
    mean /= call_.keys;
    for (const double c : joint_) square += (c - mean) * (c - mean);
    deviation_ = std::sqrt(square / call_.keys);
    for (int64_t j = 0; j < call_.keys; ++j)
      levels_[j] = may_drop(j) && joint_[j] > 1.0 / call_.keys ? static_cast<A>(joint_[j]) : A(-1);
  }

  // c_j where mode "entry" may drop entries of key j, else -1.
  A entry_level(int64_t key) const { return levels_[key]; }

  // The head's (M,) bias.
  void write_bias(int64_t head, A* bias) {
    std::fill_n(bias, call_.keys, A(0));
    if (!is_open(head)) return;
    const double* noise = call_.noise ? call_.noise + head * call_.keys : nullptr;
    if (call_.mode == JadMode::soft) return write_soft(bias);
    if (call_.mode == JadMode::dropkey) {
      int64_t dropped = 0;
      for (int64_t j = call_.protect; j < call_.keys; ++j)
        if (noise[j] < call_.max_drop) bias[j] = -kInfinity<A>, ++dropped;
      if (dropped == call_.keys) std::fill_n(bias, call_.keys, A(0));
      return;
    }
    int64_t dropped = 0;
    const double threshold = 1.0 / call_.keys + call_.beta * deviation_;
    for (int64_t j = 0; j < call_.keys; ++j)
      if (joint_[j] > threshold && may_drop(j)) order_[dropped++] = static_cast<int32_t>(j);
    const int64_t limit = static_cast<int64_t>(call_.max_drop * call_.keys);
    if (dropped > limit) {
      std::stable_sort(order_.begin(), order_.begin() + dropped,
                       [&](int32_t i, int32_t j) { return joint_[i] > joint_[j]; });
      dropped = limit;
    }
    if (call_.mode == JadMode::random) {
      int64_t free = 0;
      for (int64_t j = call_.protect; j < call_.keys; ++j) order_[free++] = static_cast<int32_t>(j);
      std::stable_sort(order_.begin(), order_.begin() + free, [&](int32_t i, int32_t j) { return noise[i] < noise[j]; });
    }
    for (int64_t n = 0; n < dropped; ++n) bias[order_[n]] = -kInfinity<A>;
  }

 private:
  void write_soft(A* bias) const {
    double top = 0;
    for (const double c : joint_) {
      if (c != c) return;
      top = std::max(top, c);
    }
    if (!(top > 0)) return;
    for (int64_t j = 0; j < call_.keys; ++j) bias[j] = static_cast<A>(std::log1p(-call_.soft * (joint_[j] / top)));
  }

  bool may_drop(int64_t key) const { return key >= call_.protect && call_.keys * deviation_ >= kNearlyUniform; }

  const JadForward& call_;
  std::vector<double> joint_;
  std::vector<A> levels_;
  std::vector<int32_t> order_;
  double deviation_ = 0;
};

// ---- forward ----

bool is_biased(JadMode mode) { return mode != JadMode::none && mode != JadMode::entry; }
bool wants_means(const JadForward& call) {
  return call.column_mean || (call.mode != JadMode::none && call.mode != JadMode::dropkey);
}
int64_t chunks(const JadForward& call) { return (call.queries + kChunkQueries - 1) / kChunkQueries; }

template <class A, class T>
class Forward {
 public:
  explicit Forward(const JadForward& call, bool keep_all)
      : call_(call),
        pitch_(padded<A>(call.width)),
        rows_(padded_rows(call.keys)),
        panels_(keep_all ? (call.queries + kP - 1) / kP : 1),
        choice_(call),
        key_factor_(call.keys, call.width, call.queries),
        powers_(allocate<A>(panels_ * rows_ * kP)),
        largest_(allocate<A>(panels_ * kP)),
        total_(allocate<A>(panels_ * kP)),
        out_(allocate<A>(kP * pitch_)),
        sums_(call.keys) {}

  // A whole head, its powers kept.
  void head(int64_t head, A* means) {
    enter(head, nullptr);
    const bool open = call_.mode != JadMode::none && choice_.is_open(head);
    const bool look = call_.column_mean || (open && call_.mode != JadMode::dropkey);
    std::fill(sums_.begin(), sums_.end(), 0.0);
    each_panel(0, call_.queries, [&](int64_t first, int count, int64_t at) {
      powers(first, count, nullptr, at);
      if (look) add_column_sums(count, at);
    });
    if (look) {
      store_means(head, means);
      choice_.look_at(means, head);
    }
    A* bias = is_biased(call_.mode) ? static_cast<A*>(call_.bias) + head * call_.keys : nullptr;
    if (bias) choice_.write_bias(head, bias);
    if (!call_.out) return each_panel(0, call_.queries, [&](int64_t first, int count, int64_t at) { finish(first, count, at); });
    keep(bias);
    take_values();
    each_panel(0, call_.queries, [&](int64_t first, int count, int64_t at) {
      if (bias) apply(first, count, bias, at);
      if (call_.mode == JadMode::entry) drop_entries(first, count, at);
      values(count, at, kept_.size() == static_cast<size_t>(call_.keys) ? nullptr : kept_.data());
      finish(first, count, at);
    });
  }

  // The column sums of some queries of a head; their lse where nothing else comes after.
  void means(int64_t unit, double* parts) {
    enter_once(unit / chunks(call_), nullptr);
    std::fill(sums_.begin(), sums_.end(), 0.0);
    const int64_t begin = unit % chunks(call_) * kChunkQueries;
    each_panel(begin, std::min(begin + kChunkQueries, call_.queries), [&](int64_t first, int count, int64_t) {
      powers(first, count, nullptr, 0);
      add_column_sums(count, 0);
      if (!call_.out) finish(first, count, 0);
    });
    std::copy(sums_.begin(), sums_.end(), parts + unit * call_.keys);
  }

  // The outputs of some queries of a head, with bias and column means known.
  void outputs(int64_t unit, const A* means) {
    const int64_t head = unit / chunks(call_);
    const A* bias = is_biased(call_.mode) ? static_cast<const A*>(call_.bias) + head * call_.keys : nullptr;
    if (head != head_) {
      keep(bias);
      const bool all = kept_.size() == static_cast<size_t>(call_.keys);
      enter(head, all ? nullptr : &kept_);
      take_values();
      if (call_.mode == JadMode::entry) choice_.look_at(means, head);
    }
    const int64_t begin = unit % chunks(call_) * kChunkQueries;
    each_panel(begin, std::min(begin + kChunkQueries, call_.queries), [&](int64_t first, int count, int64_t) {
      powers(first, count, call_.mode == JadMode::soft ? bias : nullptr, 0);
      if (call_.mode == JadMode::entry) drop_entries(first, count, 0);
      values(count, 0, nullptr);
      finish(first, count, 0);
    });
  }

 private:
  static constexpr int kP = kPanel<A>;

  template <class F>
  void each_panel(int64_t begin, int64_t end, F f) {
    for (int64_t first = begin; first < end; first += kP)
      f(first, static_cast<int>(std::min<int64_t>(kP, end - first)), (first - begin) / kP);
  }

  void enter_once(int64_t head, const std::vector<int32_t>* chosen) {
    if (head != head_) enter(head, chosen);
  }

  void enter(int64_t head, const std::vector<int32_t>* chosen) {
    head_ = head;
    keys_ = chosen ? static_cast<int64_t>(chosen->size()) : call_.keys;
    chosen_ = chosen ? chosen->data() : nullptr;
    key_factor_.enter(rows_of(call_.k));
  }

  Rows<A, T> rows_of(const void* data) const {
    return {static_cast<const T*>(data) + head_ * call_.keys * call_.width, keys_, call_.width, chosen_, call_.keys};
  }
  void take_values() { values_ = rows_of(call_.v).to_matrix(value_rows_); }

  // Which keys are not dropped by a bias of -inf.
  void keep(const A* bias) {
    kept_.clear();
    for (int64_t j = 0; j < call_.keys; ++j)
      if (!bias || bias[j] != -kInfinity<A>) kept_.push_back(static_cast<int32_t>(j));
  }

  A* panel(int64_t at) { return powers_.get() + at * rows_ * kP; }
  static int vectors(int count) { return count > kLanes<A> ? 2 : 1; }

  // Powers exp(score - largest) of a panel and their sums.
  void powers(int64_t first, int count, const A* bias, int64_t at) {
    const T* q = static_cast<const T*>(call_.q) + (head_ * call_.queries + first) * call_.width;
    A* to = panel(at);
    key_factor_.times(q, count, static_cast<A>(call_.scale), to);
    for (int v = 0; v < vectors(count); ++v) {
      A* column = to + v * kLanes<A>;
      Vec<A> largest = splat(-kInfinity<A>);
      for (int64_t j = 0; j < keys_; ++j) {
        Vec<A> score = load(column + j * kP);
        if (bias) store(column + j * kP, score += splat(bias[j]));
        largest = score > largest ? score : largest;
      }
      // A row of -inf alone weighs nothing.
      largest = largest == splat(-kInfinity<A>) ? Vec<A>{} : largest;
      const Vec<A> total = blocked_sum<A>(keys_, [&](int64_t j) {
        const Vec<A> power = exponential(load(column + j * kP) - largest);
        store(column + j * kP, power);
        return power;
      });
      store(largest_.get() + at * kP + v * kLanes<A>, largest);
      store(total_.get() + at * kP + v * kLanes<A>, total);
    }
  }

  // 1 / total in the lanes of queries that exist and have any power, 0 in the others.
  Vec<A> shares(int v, int count, int64_t at) const {
    Vec<A> share = splat(A(1)) / load(total_.get() + at * kP + v * kLanes<A>);
    for (int l = 0; l < kLanes<A>; ++l)
      if (v * kLanes<A> + l >= count || share[l] == kInfinity<A>) share[l] = 0;
    return share;
  }

  void add_column_sums(int count, int64_t at) {
    const A* from = panel(at);
    Vec<A> share[2] = {};
    for (int v = 0; v < vectors(count); ++v) share[v] = shares(v, count, at);
    for (int64_t j = 0; j < keys_; j += kLanes<A>) {
      const int some = static_cast<int>(std::min<int64_t>(kLanes<A>, keys_ - j));
      Vec<A> weights[kLanes<A>] = {};
      for (int r = 0; r < some; ++r)
        for (int v = 0; v < vectors(count); ++v) weights[r] += load(from + (j + r) * kP + v * kLanes<A>) * share[v];
      const Vec<A> sums = total_of_each<A>(weights);
      for (int r = 0; r < some; ++r) sums_[j + r] += sums[r];
    }
  }

  void store_means(int64_t head, A* means) const {
    for (int64_t j = 0; j < call_.keys; ++j) means[head * call_.keys + j] = static_cast<A>(sums_[j] / call_.queries);
  }

  // Powers under a bias that was found after them.
  void apply(int64_t first, int count, const A* bias, int64_t at) {
    if (call_.mode == JadMode::soft)
      for (int64_t j = 0; j < keys_; ++j) {
        const Vec<A> factor = exponential(splat(bias[j]));
        for (int v = 0; v < vectors(count); ++v) {
          A* power = panel(at) + j * kP + v * kLanes<A>;
          store(power, load(power) * factor);
        }
      }
    else if (kept_.size() == static_cast<size_t>(call_.keys))
      return;
    bool lost = false;
    for (int v = 0; v < vectors(count); ++v) {
      const A* column = panel(at) + v * kLanes<A>;
      const Vec<A> total = blocked_sum<A>(kept_.size(), [&](int64_t n) { return load(column + kept_[n] * kP); });
      store(total_.get() + at * kP + v * kLanes<A>, total);
      for (int l = 0; l < kLanes<A>; ++l) lost |= total[l] < static_cast<A>(kLostPowers);
    }
    if (lost) powers(first, count, bias, at);
  }

  void drop_entries(int64_t first, int count, int64_t at) {
    const int64_t bytes = (call_.keys + 7) / 8;
    uint8_t* bits = call_.bits ? call_.bits + (head_ * call_.queries + first) * bytes : nullptr;
    if (!choice_.is_open(head_)) {
      if (bits) std::fill_n(bits, count * bytes, 0);
      return;
    }
    for (int v = 0; v < vectors(count); ++v) {
      A* column = panel(at) + v * kLanes<A>;
      const Vec<A> share = shares(v, count, at);
      const auto drops = [&](int64_t j, A level) {
        const Vec<A> off = load(column + j * kP) * share - splat(level);
        return (off < Vec<A>{} ? -off : off) <= splat(static_cast<A>(call_.tau) * level);
      };
      const Vec<A> kept = blocked_sum<A>(keys_, [&](int64_t j) {
        const Vec<A> power = load(column + j * kP);
        const A level = choice_.entry_level(j);
        return level < 0 ? power : drops(j, level) ? Vec<A>{} : power;
      });
      const auto enough = kept * share >= splat(static_cast<A>(kLostMass));
      for (int64_t byte = 0; byte < bytes; ++byte) {
        Vec<Int<A>> packed = {};
        for (int64_t j = 8 * byte; j < std::min(8 * byte + 8, keys_); ++j) {
          const A level = choice_.entry_level(j);
          if (level < 0) continue;
          const auto dropped = drops(j, level) & enough;
          store(column + j * kP, dropped ? Vec<A>{} : load(column + j * kP));
          packed |= dropped & splat(static_cast<Int<A>>(1 << j % 8));
        }
        for (int l = 0; bits && l < kLanes<A> && v * kLanes<A> + l < count; ++l)
          bits[(v * kLanes<A> + l) * bytes + byte] = static_cast<uint8_t>(packed[l]);
      }
      A* total = total_.get() + at * kP + v * kLanes<A>;
      store(total, enough ? kept : load(total));
    }
  }

  void values(int count, int64_t at, const int32_t* chosen) {
    const int64_t keys = chosen ? static_cast<int64_t>(kept_.size()) : keys_;
    weighted_rows(panel(at), keys, chosen, values_, pitch_, count, out_.get());
  }

  void finish(int64_t first, int count, int64_t at) {
    const int64_t row = head_ * call_.queries + first;
    for (int i = 0; i < count; ++i) {
      const A total = total_[at * kP + i];
      static_cast<A*>(call_.lse)[row + i] = total == 0 ? -kInfinity<A> : largest_[at * kP + i] + std::log(total);
      if (!call_.out) continue;
      const Vec<A> divisor = splat(total == 0 ? A(1) : total);
      A* out = out_.get() + i * pitch_;
      for (int64_t c = 0; c < pitch_; c += kLanes<A>) store(out + c, load(out + c) / divisor);
      store_row(out, call_.width, static_cast<T*>(call_.out) + (row + i) * call_.width);
    }
  }

  const JadForward& call_;
  const int64_t pitch_, rows_, panels_;
  Choice<A> choice_;
  int64_t head_ = -1, keys_ = 0;
  const int32_t* chosen_ = nullptr;
  const A* values_ = nullptr;
  Factor<A, T> key_factor_;
  Buffer<A> powers_, largest_, total_, out_, value_rows_;
  std::vector<double> sums_;
  std::vector<int32_t> kept_;
};

// ---- backward ----

template <class A, class T>
class Backward {
 public:
  explicit Backward(const JadBackward& call)
      : call_(call), pitch_(padded<A>(call.width)), rows_(padded_rows(call.keys)),
        key_factor_(call.keys, call.width, call.queries), value_factor_(call.v ? call.keys : 0, call.width, call.queries) {
    query_rows_ = allocate<A>(kP * pitch_);
    weights_ = allocate<A>(rows_ * kP);
    grads_ = allocate<A>(rows_ * kP);
    key_sums_ = allocate<A>(rows_ * pitch_);
    dq_ = allocate<A>(kP * pitch_);
    if (!call.v) return;
    grad_rows_ = allocate<A>(kP * pitch_);
    value_sums_ = allocate<A>(rows_ * pitch_);
  }

  void head(int64_t head) {
    head_ = head;
    bias_ = call_.bias ? static_cast<const A*>(call_.bias) + head * call_.keys : nullptr;
    kept_.clear();
    for (int64_t j = 0; j < call_.keys; ++j)
      if (!bias_ || bias_[j] != -kInfinity<A>) kept_.push_back(static_cast<int32_t>(j));
    keys_ = static_cast<int64_t>(kept_.size());
    chosen_ = keys_ == call_.keys ? nullptr : kept_.data();
    key_factor_.enter(rows_of(call_.k));
    const A* key_rows = rows_of(call_.k).to_matrix(key_rows_);
    if (call_.v) value_factor_.enter(rows_of(call_.v));
    for (int64_t first = 0; first < call_.queries; first += kP)
      panel(first, static_cast<int>(std::min<int64_t>(kP, call_.queries - first)), key_rows);
    write(key_sums_.get(), call_.dk);
    if (call_.v) write(value_sums_.get(), call_.dv);
  }

 private:
  static constexpr int kP = kPanel<A>;

  Rows<A, T> rows_of(const void* data) const {
    return {static_cast<const T*>(data) + head_ * call_.keys * call_.width, keys_, call_.width, chosen_, call_.keys};
  }

  void panel(int64_t first, int count, const A* key_rows) {
    const int64_t row = head_ * call_.queries + first;
    const A scale = static_cast<A>(call_.scale);
    const T *q = static_cast<const T*>(call_.q) + row * call_.width, *grad = static_cast<const T*>(call_.grad) + row * call_.width;
    to_rows(q, count, query_rows_.get());
    key_factor_.times(q, count, scale, weights_.get());
    if (call_.v) {
      to_rows(grad, count, grad_rows_.get());
      value_factor_.times(grad, count, A(1), grads_.get());
    }
    for (int v = 0; v * kLanes<A> < count; ++v) score_grads(row, v, count);
    if (call_.v) sum_up(weights_.get(), grad_rows_.get(), first, count, A(1), value_sums_.get(), call_.dv);
    sum_up(grads_.get(), query_rows_.get(), first, count, scale, key_sums_.get(), call_.dk);
    weighted_rows<A>(grads_.get(), keys_, nullptr, key_rows, pitch_, count, dq_.get());
    multiply(dq_.get(), count * pitch_, scale);
    for (int i = 0; i < count; ++i)
      store_row(dq_.get() + i * pitch_, call_.width, static_cast<T*>(call_.dq) + (row + i) * call_.width);
  }

  // A panel's part of a gradient of the keys' rows. With few queries these sums are most of the work, so that
  // the first panel sets them, the last one scales, and the only one writes them to their place.
  void sum_up(const A* values, const A* matrix, int64_t first, int count, A scale, A* sums, void* data) {
    const bool begins = first == 0, ends = first + count == call_.queries;
    const auto sum = [&](auto to) {
      weighted_queries(values, keys_, matrix, pitch_, count, [&](int64_t n, int64_t c, Vec<A> part) {
        A* at = to(n) + c;
        if (!begins) part += load(at);
        store(at, ends ? part * scale : part);
      });
    };
    if constexpr (std::is_same_v<A, T>)
      if (in_place()) {
        A* rows = static_cast<A*>(data) + head_ * call_.keys * call_.width;
        return sum([&](int64_t n) { return n < keys_ ? rows + kept_[n] * pitch_ : sums; });  // a tile may end later
      }
    sum([&](int64_t n) { return sums + n * pitch_; });
  }
  bool in_place() const { return std::is_same_v<A, T> && call_.queries <= kP && call_.width == pitch_; }

  void to_rows(const T* rows, int count, A* matrix) const {
    for (int i = 0; i < count; ++i) load_row(rows + i * call_.width, call_.width, pitch_, matrix + i * pitch_);
  }

  static void multiply(A* values, int64_t count, A factor) {
    for (int64_t n = 0; n < count; n += kLanes<A>) store(values + n, load(values + n) * factor);
  }

  // Scores to weights, and the gradients of the weights to those of the scores: a vector of queries. The weights
  // are computed as in the forward, and not from its lse, whose rounding would be in all of them.
  void score_grads(int64_t row, int v, int count) {
    constexpr int lanes = kLanes<A>;
    A *weights = weights_.get() + v * lanes, *grads = grads_.get() + v * lanes;
    if (bias_ || call_.bits) add_bias(row, v, count, weights);
    Vec<A> largest = splat(-kInfinity<A>);
    for (int64_t n = 0; n < keys_; ++n) {
      const Vec<A> score = load(weights + n * kP);
      largest = score > largest ? score : largest;
    }
    largest = largest == splat(-kInfinity<A>) ? Vec<A>{} : largest;
    const A* means = call_.v ? nullptr : static_cast<const A*>(call_.grad_means) + head_ * call_.keys;
    const Vec<A> total = blocked_sum<A>(keys_, [&](int64_t n) {
      const Vec<A> power = exponential(load(weights + n * kP) - largest);
      if (means) store(grads + n * kP, splat(means[kept_[n]] / static_cast<A>(call_.queries)));
      store(weights + n * kP, power);
      return power;
    });
    // A row of -inf alone weighs nothing. Weights are divided, for a rounded 1 / total would be in all of them.
    const Vec<A> divisor = total == Vec<A>{} ? splat(A(1)) : total;
    const Vec<A> mean = blocked_sum<A>(keys_, [&](int64_t n) {
      const Vec<A> weight = load(weights + n * kP) / divisor;
      store(weights + n * kP, weight);
      return weight * load(grads + n * kP);
    });
    for (int64_t n = 0; n < keys_; ++n) {
      const Vec<A> weight = load(weights + n * kP);
      store(grads + n * kP, weight * (load(grads + n * kP) - mean));
    }
  }

  void add_bias(int64_t row, int v, int count, A* scores) const {
    const int64_t bytes = (call_.keys + 7) / 8;
    const uint8_t* bits = call_.bits ? call_.bits + (row + v * kLanes<A>) * bytes : nullptr;
    Vec<Int<A>> packed = {};  // byte `at` of each query
    int64_t at = -1;
    for (int64_t n = 0; n < keys_; ++n) {
      const int64_t j = kept_[n];
      Vec<A> score = load(scores + n * kP);
      if (bias_) score += splat(bias_[j]);
      if (bits) {
        if (at != j / 8) {
          at = j / 8;
          for (int l = 0; l < kLanes<A> && v * kLanes<A> + l < count; ++l) packed[l] = bits[l * bytes + at];
        }
        const auto dropped = (packed & splat(static_cast<Int<A>>(1 << j % 8))) != Vec<Int<A>>{};
        score = dropped ? splat(-kInfinity<A>) : score;
      }
      store(scores + n * kP, score);
    }
  }

  // The kept keys' sums to their rows, zeros to the others'.
  void write(const A* sums, void* data) const {
    T* to = static_cast<T*>(data) + head_ * call_.keys * call_.width;
    for (int64_t j = 0, n = 0; chosen_ && j < call_.keys; ++j)
      if (n < keys_ && kept_[n] == j)
        ++n;
      else
        std::fill_n(to + j * call_.width, call_.width, T{});
    if (in_place()) return;
    for (int64_t n = 0; n < keys_; ++n) store_row(sums + n * pitch_, call_.width, to + kept_[n] * call_.width);
  }

  const JadBackward& call_;
  const int64_t pitch_, rows_;
  int64_t head_ = -1, keys_ = 0;
  const A* bias_ = nullptr;
  const int32_t* chosen_ = nullptr;
  std::vector<int32_t> kept_;
  Factor<A, T> key_factor_, value_factor_;
  Buffer<A> key_rows_, query_rows_, grad_rows_;
  Buffer<A> weights_, grads_, key_sums_, value_sums_, dq_;
};

}  // namespace

bool jad_keeps_powers(const JadForward& call) {
  const int64_t size = call.dtype == Dtype::f64 ? 8 : 4;
  return !(call.joint_over_head && wants_means(call)) && call.queries * call.keys * size <= kKeptBytes;
}
int64_t jad_chunks(const JadForward& call) { return chunks(call); }
bool jad_wants_means(const JadForward& call) { return wants_means(call); }

void jad_heads(const JadForward& call, void* means, int64_t begin, int64_t end) {
  with_types(call.dtype, [&](auto accumulator, auto element) {
    using A = decltype(accumulator);
    Forward<A, decltype(element)> worker(call, true);
    for (int64_t head = begin; head < end; ++head) worker.head(head, static_cast<A*>(means));
  });
}

void jad_means(const JadForward& call, double* parts, int64_t begin, int64_t end) {
  with_types(call.dtype, [&](auto accumulator, auto element) {
    Forward<decltype(accumulator), decltype(element)> worker(call, false);
    for (int64_t unit = begin; unit < end; ++unit) worker.means(unit, parts);
  });
}

void jad_choose(const JadForward& call, const double* parts, void* means) {
  with_types(call.dtype, [&](auto accumulator, auto) {
    using A = decltype(accumulator);
    A* to = static_cast<A*>(means);
    for (int64_t head = 0; parts && head < call.batch * call.heads; ++head)
      for (int64_t j = 0; j < call.keys; ++j) {
        double sum = 0;
        for (int64_t c = 0; c < chunks(call); ++c) sum += parts[(head * chunks(call) + c) * call.keys + j];
        to[head * call.keys + j] = static_cast<A>(sum / call.queries);
      }
    if (!is_biased(call.mode)) return;
    Choice<A> choice(call);
    for (int64_t head = 0; head < call.batch * call.heads; ++head) {
      if (parts) choice.look_at(to, head);
      choice.write_bias(head, static_cast<A*>(call.bias) + head * call.keys);
    }
  });
}

void jad_outputs(const JadForward& call, const void* means, int64_t begin, int64_t end) {
  with_types(call.dtype, [&](auto accumulator, auto element) {
    using A = decltype(accumulator);
    Forward<A, decltype(element)> worker(call, false);
    for (int64_t unit = begin; unit < end; ++unit) worker.outputs(unit, static_cast<const A*>(means));
  });
}

void jad_backward(const JadBackward& call, int64_t begin, int64_t end) {
  with_types(call.dtype, [&](auto accumulator, auto element) {
    Backward<decltype(accumulator), decltype(element)> worker(call);
    for (int64_t head = begin; head < end; ++head) worker.head(head);
  });
}

}  // namespace fer::cpu::FER_ISA
