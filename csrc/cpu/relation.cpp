// relation on the CPU. Compiled once for every instruction set (see simd.h).
//
// A head touches only its own channels of x and y and its own part of p, q and a. So a sample's head is
// one unit of work, forward and backward: its neighbours' features are packed into a panel that stays in
// the cache, and in the backward pass it alone adds to the gradients of its channels, query by query. That
// needs no atomics and no reverse graph, and the order of every sum is the same for any number of threads.
//
// Scores are computed for as many queries at once as a vector has lanes: each edge's products are one vector,
// and a transposing sum turns those of several queries into one vector of scores, on which the softmax runs.
#include "kernels.h"

#include <algorithm>
#include <utility>

#include "simd.h"

namespace fer::cpu::FER_ISA {
namespace {

constexpr int64_t kChunk = 64;     // channels of a unit in mode mr, which has no heads
constexpr int64_t kQueries = 512;  // queries of a forward unit, so that few heads feed many threads
constexpr int kTile = FER_VECTOR_BYTES == 64 ? 4 : 2;  // vectors of a row whose state fits the registers

int64_t group_width(const RelationCall& call) {
  return call.mode == RelationMode::mr ? kChunk : call.channels / call.heads;
}
int64_t groups(const RelationCall& call) {
  return call.mode == RelationMode::mr ? (call.channels + kChunk - 1) / kChunk : call.heads;
}
int64_t query_blocks(const RelationCall& call) { return (call.queries + kQueries - 1) / kQueries; }

// Calls f with std::integral_constant<int, V> for the V vectors at c of each tile of a row.
template <class A, class F>
void for_each_tile(int64_t width, F f) {
  constexpr int lanes = kLanes<A>;
  int64_t c = 0;
  for (; c + kTile * lanes <= width; c += kTile * lanes) f(std::integral_constant<int, kTile>{}, c);
  const int64_t rest = (width - c) / lanes;
  if constexpr (kTile == 4) {
    if (rest == 3) f(std::integral_constant<int, 3>{}, c);
    if (rest == 2) f(std::integral_constant<int, 2>{}, c);
  }
  if (rest == 1) f(std::integral_constant<int, 1>{}, c);
}

// A sum that carries what each addition rounds away: an error of a softmax's total or of the mean in its
// gradient is the same for all neighbours, and grows with k in da.
template <class A>
class ExactSum {
 public:
  void add(Vec<A> value) {
    const Vec<A> sum = sum_ + value, added = sum - sum_;
    lost_ += (sum_ - (sum - added)) + (value - added);
    sum_ = sum;
  }
  // Not lost_ where the sum is infinite: it is NaN there.
  Vec<A> value() const {
    const Vec<A> both = sum_ + lost_;
    return lost_ == lost_ ? both : sum_;
  }

 private:
  Vec<A> sum_ = {}, lost_ = {};
};

// The lines of a row that is read (written) some rows later: rows are short, and the processor foresees little.
template <bool written = false, class E>
inline void fetch(const E* row, int64_t width) {
  for (int64_t c = 0; c < width; c += 64 / static_cast<int64_t>(sizeof(E))) __builtin_prefetch(row + c, written, 3);
}
constexpr int64_t kAhead = 8;  // so many

// What forward and backward share: one sample's group of channels, and the softmax of its scores.
template <class A, class T>
class Group {
 protected:
  static constexpr int kQ = kLanes<A>;  // queries whose scores are computed together

  explicit Group(const RelationCall& call)
      : call_(call),
        relational_(call.mode != RelationMode::mr),
        pad_(padded<A>(std::min(group_width(call), call.channels))),
        relation_pad_(padded<A>(call.width)),
        slope_(static_cast<A>(call.negative_slope)),
        offsets_(allocate<int64_t>(call.k)) {
    if (!relational_) return;
    a_ = allocate<A>(relation_pad_);
    q_ = allocate<A>(call.keys * relation_pad_);
    p_ = allocate<A>(kQ * relation_pad_);
    power_ = allocate<A>(call.k * kQ);
    factor_ = allocate<A>(call.k * kQ);
  }

  void enter(int64_t sample, int64_t group) {
    sample_ = sample;
    group_ = group;
    first_ = group * group_width(call_);
    width_ = std::min(group_width(call_), call_.channels - first_);
    if (!relational_) return;
    load_row(static_cast<const T*>(call_.a) + group * call_.width, call_.width, relation_pad_, a_.get());
    pack(call_.q, call_.keys, call_.heads * call_.width, group * call_.width, call_.width, relation_pad_, q_.get());
  }

  void pack_keys(A* panel) const { pack(call_.y, call_.keys, call_.channels, first_, width_, pad_, panel); }

  // Powers and factors of queries [first, first + count): lane t of vector s is query first + t, slot s. The
  // lanes beyond `count` repeat the last query.
  void softmax(int64_t first, int count) {
    constexpr int lanes = kLanes<A>;
    const T* p = row(static_cast<const T*>(call_.p), first, call_.heads * call_.width) + group_ * call_.width;
    for (int t = 0; t < kQ; ++t)
      load_row(p + std::min(t, count - 1) * call_.heads * call_.width, call_.width, relation_pad_,
               p_.get() + t * relation_pad_);
    const int64_t* idx = row(call_.idx, first, call_.k);
    Vec<A> largest = {};
    for (int s = 0; s < call_.k; ++s) {
      Vec<A> products[kQ];
#pragma GCC unroll 16
      for (int t = 0; t < kQ; ++t) {
        const A* q = q_.get() + idx[std::min(t, count - 1) * call_.k + s] * relation_pad_;
        products[t] = edge_products(p_.get() + t * relation_pad_, q);
      }
      const Vec<A> score = total_of_each<A>(products);
      store(power_.get() + s * lanes, score);
      largest = s == 0 || score > largest ? score : largest;
    }
    ExactSum<A> total;
    for (int s = 0; s < call_.k; ++s) {
      const Vec<A> power = exponential(load(power_.get() + s * lanes) - largest);
      store(power_.get() + s * lanes, power);
      total.add(power);
    }
    total_ = total.value();
    // Equal powers sum to k exactly, so the factor of rmr is exactly 1 where a = 0.
    const Vec<A> scale = splat(call_.mode == RelationMode::rmr ? static_cast<A>(call_.k) : A(1)) / total_;
    for (int s = 0; s < call_.k; ++s) store(factor_.get() + s * lanes, load(power_.get() + s * lanes) * scale);
  }

  void point_at_keys(int64_t query) {
    const int64_t* idx = row(call_.idx, query, call_.k);
    for (int s = 0; s < call_.k; ++s) offsets_[s] = idx[s] * pad_;
  }

  // Row `query` of this sample in a (B, N, pitch) array.
  template <class E>
  E* row(E* data, int64_t query, int64_t pitch) const {
    return data + (sample_ * call_.queries + query) * pitch;
  }

  const RelationCall& call_;
  const bool relational_;
  const int64_t pad_, relation_pad_;  // row pitches of the panels
  const A slope_;
  int64_t sample_ = -1, group_ = -1, first_ = 0, width_ = 0;  // channels [first_, first_ + width_)
  Buffer<int64_t> offsets_;                                   // of a query's neighbours in a panel
  Buffer<A> a_, q_, p_, power_, factor_;
  Vec<A> total_;

 private:
  // Columns [first, first + width) of a sample's `rows` rows.
  void pack(const void* data, int64_t rows, int64_t pitch, int64_t first, int64_t width, int64_t pad, A* panel) const {
    const T* from = static_cast<const T*>(data) + sample_ * rows * pitch + first;
    for (int64_t j = 0; j < rows; ++j) {
      fetch(from + (j + kAhead) * pitch, width);
      load_row(from + j * pitch, width, pad, panel + j * pad);
    }
  }

  Vec<A> edge_products(const A* p, const A* q) const {
    Vec<A> sum = {};
    for (int64_t r = 0; r < relation_pad_; r += kLanes<A>) {
      const Vec<A> z = load(p + r) + load(q + r);
      sum += load(a_.get() + r) * (z > Vec<A>{} ? z : splat(slope_) * z);
    }
    return sum;
  }
};

// ---- forward ----

template <class A, class T>
class Forward : Group<A, T> {
 public:
  explicit Forward(const RelationForward& call)
      : Base(call), forward_(call), y_(allocate<A>(call.keys * pad_)), x_(allocate<A>(pad_)), out_(allocate<A>(pad_)),
        slots_(allocate<Int<A>>(pad_)) {}

  void run(int64_t unit) {
    const int64_t blocks = query_blocks(call_), sample = unit / blocks / groups(call_), group = unit / blocks % groups(call_);
    if (sample != sample_ || group != group_) {
      this->enter(sample, group);
      this->pack_keys(y_.get());
    }
    const int64_t begin = unit % blocks * kQueries, end = std::min(begin + kQueries, call_.queries);
    for (int64_t first = begin; first < end; first += kQ) {
      const int count = static_cast<int>(std::min<int64_t>(kQ, end - first));
      if (relational_) this->softmax(first, count);
      for (int t = 0; t < count; ++t) query(first + t, t);
      if (forward_.weights)
        for (int t = 0; t < count; ++t) weights(first + t, t);
    }
  }

 private:
  using Base = Group<A, T>;
  using Base::call_, Base::relational_, Base::pad_, Base::sample_, Base::group_, Base::first_, Base::width_, Base::kQ,
      Base::offsets_, Base::power_, Base::factor_, Base::total_;

  void query(int64_t i, int lane) {
    this->point_at_keys(i);
    const T* x = this->row(static_cast<const T*>(call_.x), i, call_.channels) + first_;
    T* out = this->row(static_cast<T*>(forward_.out), i, call_.channels) + first_;
    fetch(x + kAhead * call_.channels, width_);
    fetch<true>(out + kAhead * call_.channels, width_);
    load_row(x, width_, pad_, x_.get());
    for_each_tile<A>(pad_, [&](auto vectors, int64_t c) {
      constexpr int V = vectors;
      if (call_.mode == RelationMode::rsum)
        sum_tile<V>(c, lane);
      else if (relational_)
        forward_.slots ? max_tile<V, true, true>(c, lane) : max_tile<V, true, false>(c, lane);
      else
        forward_.slots ? max_tile<V, false, true>(c, lane) : max_tile<V, false, false>(c, lane);
    });
    store_row(out_.get(), width_, out);
    if (forward_.slots) {
      uint8_t* slots = this->row(forward_.slots, i, call_.channels) + first_;
      fetch<true>(slots + kAhead * call_.channels, width_);
      for (int64_t c = 0; c < width_; ++c) slots[c] = static_cast<uint8_t>(slots_[c]);
    }
  }

  template <int V, bool kWeighted, bool kSlots>
  void max_tile(int64_t c, int lane) {
    constexpr int lanes = kLanes<A>;
    Vec<A> x[V], best[V];
    Vec<Int<A>> slot[V];
    for (int s = 0; s < call_.k; ++s) {
      const A* y = y_.get() + offsets_[s] + c;
      const Vec<A> factor = kWeighted ? splat(factor_[s * lanes + lane]) : Vec<A>{};
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        if (s == 0) x[v] = load(x_.get() + c + v * lanes);
        Vec<A> value = load(y + v * lanes) - x[v];
        if (kWeighted) value = factor * value;
        if (s == 0) {
          best[v] = value;
          if (kSlots) slot[v] = Vec<Int<A>>{};
          continue;
        }
        keep_larger<A>(value, s, best[v], slot[v]);
      }
    }
    for (int v = 0; v < V; ++v) {
      store(out_.get() + c + v * lanes, best[v]);
      if (kSlots) store(slots_.get() + c + v * lanes, slot[v]);
    }
  }

  template <int V>
  void sum_tile(int64_t c, int lane) {
    constexpr int lanes = kLanes<A>;
    Vec<A> sum[V] = {};
    for (int s = 0; s < call_.k; ++s) {
      const A* y = y_.get() + offsets_[s] + c;
      const Vec<A> factor = splat(factor_[s * lanes + lane]);
      for (int v = 0; v < V; ++v) sum[v] += factor * (load(y + v * lanes) - load(x_.get() + c + v * lanes));
    }
    for (int v = 0; v < V; ++v) store(out_.get() + c + v * lanes, sum[v]);
  }

  void weights(int64_t i, int lane) const {
    T* to = this->row(static_cast<T*>(forward_.weights), i, call_.k * call_.heads) + group_;
    for (int s = 0; s < call_.k; ++s) to[s * call_.heads] = narrow<T, A>(power_[s * kQ + lane] / total_[lane]);
  }

  const RelationForward& forward_;
  Buffer<A> y_, x_, out_;
  Buffer<Int<A>> slots_;
};

// ---- backward ----

template <class A, class T>
class Backward : Group<A, T> {
 public:
  explicit Backward(const RelationBackward& call)
      : Base(call), backward_(call), grad_(allocate<A>(pad_)), routed_(allocate<A>(pad_)), slots_(allocate<uint8_t>(pad_)) {
    if (call.need_nodes) node_sums_ = allocate<A>(call.keys * pad_);
    if (!call.need_relation) return;
    y_ = allocate<A>(call.keys * pad_);
    x_ = allocate<A>(pad_);
    alpha_grads_ = allocate<A>(call.k * kQ * kQ);
    score_grads_ = allocate<A>(call.k * kQ);
    q_sums_ = allocate<A>(call.keys * relation_pad_);
    p_sums_ = allocate<A>(relation_pad_);
    a_sums_ = allocate<A>(relation_pad_);
    a_total_ = allocate<double>(relation_pad_);
  }

  // da_parts: (units, width), this unit's part of da.
  void run(int64_t unit, double* da_parts) {
    this->enter(unit / groups(call_), unit % groups(call_));
    if (backward_.need_nodes) std::fill_n(node_sums_.get(), call_.keys * pad_, A(0));
    if (backward_.need_relation) {
      this->pack_keys(y_.get());
      std::fill_n(q_sums_.get(), call_.keys * relation_pad_, A(0));
      std::fill_n(a_total_.get(), relation_pad_, 0.0);
    }
    for (int64_t first = 0; first < call_.queries; first += kQ) {
      const int count = static_cast<int>(std::min<int64_t>(kQ, call_.queries - first));
      if (relational_) this->softmax(first, count);
      for (int t = 0; t < count; ++t) nodes(first + t, t);
      if (!backward_.need_relation) continue;
      scores(first, count);
      std::fill_n(a_sums_.get(), relation_pad_, A(0));
      for (int t = 0; t < count; ++t) relation(first + t, t);
      for (int64_t r = 0; r < relation_pad_; ++r) a_total_[r] += a_sums_[r];
    }
    if (backward_.need_nodes) {
      void* to = backward_.own_keys ? backward_.dx : backward_.dy;
      write(node_sums_.get(), pad_, width_, static_cast<T*>(to), call_.channels, first_);
    }
    if (backward_.need_relation) {
      write(q_sums_.get(), relation_pad_, call_.width, static_cast<T*>(backward_.dq), call_.heads * call_.width,
            group_ * call_.width);
      std::copy_n(a_total_.get(), call_.width, da_parts + unit * call_.width);
    }
  }

 private:
  using Base = Group<A, T>;
  using Base::call_, Base::relational_, Base::pad_, Base::relation_pad_, Base::slope_, Base::sample_, Base::group_,
      Base::first_, Base::width_, Base::kQ, Base::offsets_, Base::a_, Base::q_, Base::p_, Base::power_, Base::factor_,
      Base::total_;

  // A panel of sums over the keys to its columns of a (B, M, pitch) array.
  void write(const A* sums, int64_t pad, int64_t width, T* to, int64_t pitch, int64_t first) const {
    to += sample_ * call_.keys * pitch + first;
    for (int64_t j = 0; j < call_.keys; ++j) {
      fetch<true>(to + (j + kAhead) * pitch, width);
      store_row(sums + j * pad, width, to + j * pitch);
    }
  }

  // One query's gradient to its neighbours and itself; in alpha_grads_, what it gives each slot's weight.
  void nodes(int64_t i, int lane) {
    this->point_at_keys(i);
    const T* grad = this->row(static_cast<const T*>(backward_.grad), i, call_.channels) + first_;
    fetch(grad + kAhead * call_.channels, width_);
    load_row(grad, width_, pad_, grad_.get());
    if (backward_.slots) {
      const uint8_t* slots = this->row(backward_.slots, i, call_.channels) + first_;
      fetch(slots + kAhead * call_.channels, width_);
      std::copy_n(slots, width_, slots_.get());
      std::fill(slots_.get() + width_, slots_.get() + pad_, 0xFF);  // no slot: k is smaller
    }
    if (backward_.need_relation)
      load_row(this->row(static_cast<const T*>(call_.x), i, call_.channels) + first_, width_, pad_, x_.get());
    const auto with = [&](auto need_nodes, auto need_relation) {
      constexpr bool nodes = need_nodes, relation = need_relation;
      for_each_tile<A>(pad_, [&](auto vectors, int64_t c) {
        constexpr int V = vectors;
        if (call_.mode == RelationMode::rsum)
          node_tile<V, RelationMode::rsum, nodes, relation>(c, lane);
        else if (relational_)
          node_tile<V, RelationMode::rmr, nodes, relation>(c, lane);
        else
          node_tile<V, RelationMode::mr, nodes, relation>(c, lane);
      });
    };
    if (!backward_.need_relation)
      with(std::true_type{}, std::false_type{});
    else if (backward_.need_nodes)
      with(std::true_type{}, std::true_type{});
    else
      with(std::false_type{}, std::true_type{});
    if (!backward_.need_nodes) return;
    if (backward_.own_keys) {
      A* sums = node_sums_.get() + i * pad_;
      for (int64_t c = 0; c < pad_; c += kLanes<A>) store(sums + c, load(sums + c) - load(routed_.get() + c));
    } else {
      for (int64_t c = 0; c < pad_; c += kLanes<A>) store(routed_.get() + c, -load(routed_.get() + c));
      store_row(routed_.get(), width_, this->row(static_cast<T*>(backward_.dx), i, call_.channels) + first_);
    }
  }

  template <int V, RelationMode kMode, bool kNodes, bool kRelation>
  void node_tile(int64_t c, int lane) {
    constexpr int lanes = kLanes<A>;
    constexpr bool kMax = kMode != RelationMode::rsum, kWeighted = kMode != RelationMode::mr;
    Vec<A> grad[V], x[V], routed[V] = {};
    Vec<Int<A>> slot[V];
    for (int v = 0; v < V; ++v) {
      grad[v] = load(grad_.get() + c + v * lanes);
      if (kRelation) x[v] = load(x_.get() + c + v * lanes);
      if (kMax) slot[v] = load_slots(slots_.get() + c + v * lanes);
    }
    for (int s = 0; s < call_.k; ++s) {
      const Vec<A> factor = kWeighted ? splat(factor_[s * lanes + lane]) : Vec<A>{};
      Vec<A> to_weight = {};
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const int64_t at = offsets_[s] + c + v * lanes;
        // Chosen after the products, so that a factor or a neighbour of NaN stays with the slot that won.
        const auto chosen = [&](Vec<A> value) {
          return kMax ? (slot[v] == splat<Int<A>>(s) ? value : Vec<A>{}) : value;
        };
        if (kNodes) {
          const Vec<A> edge = chosen(kWeighted ? factor * grad[v] : grad[v]);
          routed[v] += edge;
          store(node_sums_.get() + at, load(node_sums_.get() + at) + edge);
        }
        if (kRelation) to_weight += chosen(grad[v] * (load(y_.get() + at) - x[v]));
      }
      if (kRelation) {
        A* to = alpha_grads_.get() + (s * kQ + lane) * lanes;
        store(to, c == 0 ? to_weight : load(to) + to_weight);
      }
    }
    if (kNodes)
      for (int v = 0; v < V; ++v) store(routed_.get() + c + v * lanes, routed[v]);
  }

  static Vec<Int<A>> load_slots(const uint8_t* from) {
    typedef uint8_t Bytes __attribute__((vector_size(kLanes<A>)));
    Bytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return __builtin_convertvector(bytes, Vec<Int<A>>);
  }

  // The softmax's gradient: score_grads_ of queries [first, first + count), in the layout of power_.
  void scores(int64_t first, int count) {
    constexpr int lanes = kLanes<A>;
    const A slots = call_.mode == RelationMode::rmr ? static_cast<A>(call_.k) : A(1);
    ExactSum<A> sum;
    for (int s = 0; s < call_.k; ++s) {
      Vec<A>* parts = reinterpret_cast<Vec<A>*>(alpha_grads_.get() + s * kQ * lanes);
      for (int t = width_ == 0 ? 0 : count; t < kQ; ++t) parts[t] = Vec<A>{};
      Vec<A> grad = splat(slots) * total_of_each<A>(parts);
      if (backward_.grad_weights) {
        const T* from = this->row(static_cast<const T*>(backward_.grad_weights), first, call_.k * call_.heads);
        for (int t = 0; t < count; ++t) grad[t] += widen<A>(from[(t * call_.k + s) * call_.heads + group_]);
      }
      store(score_grads_.get() + s * lanes, grad);
      sum.add(load(power_.get() + s * lanes) / total_ * grad);
    }
    const Vec<A> mean = sum.value();
    for (int s = 0; s < call_.k; ++s) {
      A* grad = score_grads_.get() + s * lanes;
      store(grad, load(power_.get() + s * lanes) / total_ * (load(grad) - mean));
    }
  }

  // One query's gradients to p, q and a.
  void relation(int64_t i, int lane) {
    constexpr int lanes = kLanes<A>;
    const int64_t* idx = this->row(call_.idx, i, call_.k);
    for (int64_t r = 0; r < relation_pad_; r += lanes) {
      const Vec<A> p = load(p_.get() + lane * relation_pad_ + r), a = load(a_.get() + r), flat_a = a * splat(slope_);
      Vec<A> p_sum = {}, a_sum = load(a_sums_.get() + r);
      for (int s = 0; s < call_.k; ++s) {
        const Vec<A> grad = splat(score_grads_[s * lanes + lane]);
        const int64_t at = idx[s] * relation_pad_ + r;
        const Vec<A> z = p + load(q_.get() + at);
        const auto positive = z > Vec<A>{};
        const Vec<A> edge = grad * (positive ? a : flat_a);
        p_sum += edge;
        store(q_sums_.get() + at, load(q_sums_.get() + at) + edge);
        a_sum += grad * (positive ? z : splat(slope_) * z);
      }
      store(p_sums_.get() + r, p_sum);
      store(a_sums_.get() + r, a_sum);
    }
    const int64_t pitch = call_.heads * call_.width;
    store_row(p_sums_.get(), call_.width, this->row(static_cast<T*>(backward_.dp), i, pitch) + group_ * call_.width);
  }

  const RelationBackward& backward_;
  Buffer<A> grad_, routed_, x_, y_, node_sums_;
  Buffer<uint8_t> slots_;
  // alpha_grads_: per slot and query, a vector whose lanes sum to the gradient of the weight.
  Buffer<A> alpha_grads_, score_grads_, q_sums_, p_sums_, a_sums_;
  Buffer<double> a_total_;  // a single sum over all edges would lose what few queries contribute
};

}  // namespace

void index_bounds(const int64_t* idx, int64_t count, int64_t* low, int64_t* high) {
  Vec<int64_t> least = splat<int64_t>(INT64_MAX), most = splat<int64_t>(INT64_MIN);
  int64_t i = 0;
  for (; i + kLanes<int64_t> <= count; i += kLanes<int64_t>) {
    const Vec<int64_t> values = load(idx + i);
    least = values < least ? values : least;
    most = values > most ? values : most;
  }
  for (; i < count; ++i) {
    least[0] = std::min(least[0], idx[i]);
    most[0] = std::max(most[0], idx[i]);
  }
  *low = least[0], *high = most[0];
  for (int l = 1; l < kLanes<int64_t>; ++l) *low = std::min(*low, least[l]), *high = std::max(*high, most[l]);
}

int64_t relation_units(const RelationForward& call) { return call.batch * groups(call) * query_blocks(call); }

void relation(const RelationForward& call, int64_t begin, int64_t end) {
  with_types(call.dtype, [&](auto accumulator, auto element) {
    Forward<decltype(accumulator), decltype(element)> worker(call);
    for (int64_t unit = begin; unit < end; ++unit) worker.run(unit);
  });
}

int64_t relation_backward_units(const RelationBackward& call) { return call.batch * groups(call); }

void relation_backward(const RelationBackward& call, double* da_parts, int64_t begin, int64_t end) {
  with_types(call.dtype, [&](auto accumulator, auto element) {
    Backward<decltype(accumulator), decltype(element)> worker(call);
    for (int64_t unit = begin; unit < end; ++unit) worker.run(unit, da_parts);
  });
}

// The parts' sum over the samples, in their order.
void relation_sum_parts(const RelationBackward& call, const double* da_parts) {
  with_types(call.dtype, [&](auto accumulator, auto element) {
    using A = decltype(accumulator);
    using T = decltype(element);
    const int64_t size = call.heads * call.width;
    for (int64_t r = 0; r < size; ++r) {
      double sum = 0;
      for (int64_t b = 0; b < call.batch; ++b) sum += da_parts[b * size + r];
      static_cast<T*>(call.da)[r] = narrow<T>(static_cast<A>(sum));
    }
  });
}

}  // namespace fer::cpu::FER_ISA
