// relation on a GPU. fer_kernels/relation/reference.py says what it computes.
//
// No edge tensor is ever in memory: who needs a neighbour's row gathers it again. So that most gathers
// hit the L1 cache, a block takes many rows of one sample but only a group of their heads, some
// 50 channels: what it reads of the sample is then a few ten kilobytes. There it works in items, one a
// thread at a time:
//
//   (row, slot, head)   a score, a weight, and the gradients of both
//   (row, head)         a softmax over the slots
//   (row, unit)         an aggregate; a unit is as many channels of one head as a 16-byte load brings
//
// The gradients of centres (x, p) are sums over a row's own slots, those of neighbours (y, q) sums over
// the edges that end in a row, which the reverse graph lists. Every sum belongs to one thread and is
// taken in the order of the reference, so there is nothing atomic and the bits are always the same.
#include "kernels.h"

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "fer/launch.h"
#include "fer/order.h"
#include "fer/tensor_core.h"

namespace fer::cuda {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kMaxThreads = 224;         // four such blocks a processor leave 72 registers a thread
constexpr int kBlocksPerProcessor = 4;
constexpr int kGroupChannels = 48;       // of a block at least, where heads are narrower
constexpr int kChunkChannels = 64;       // that a block stages at once at most, and of a group without heads
constexpr int64_t kMaxRows = 112;        // of a block
constexpr int64_t kEnoughBlocks = 1000;  // to fill a GPU evenly; with fewer, blocks take fewer rows
constexpr int64_t kSharedBytes = 48 * 1024;
constexpr int kSlotBatch = 3;  // loads on their way: ViG's k are multiples of it
constexpr int kEdgeBatch = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

template <class Element>
__device__ __forceinline__ Element from_float(float value) {
  if constexpr (std::is_same_v<Element, __nv_bfloat16>) {
    return __float2bfloat16_rn(value);
  } else if constexpr (std::is_same_v<Element, __half>) {
    return __float2half_rn(value);
  } else {
    return value;
  }
}

#if defined(FER_EMULATED_CUDA)
using fer_emulator::max_nan;
#else
// One instruction, unlike fmaxf and a test: a NaN wins and stays.
__device__ __forceinline__ float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
#endif

__device__ __forceinline__ float leaky_relu(float z, float slope) { return z > 0 ? z : slope * z; }
__device__ __forceinline__ float leaky_gradient(float z, float grad, float slope) {
  return z > 0 ? grad : slope * grad;
}

// ---------------------------------------------------------------------------------------------
// Units

template <int kBytes>
struct WordOf;
template <>
struct WordOf<1> { using type = uint8_t; };
template <>
struct WordOf<2> { using type = uint16_t; };
template <>
struct WordOf<4> { using type = uint32_t; };
template <>
struct WordOf<8> { using type = uint2; };
template <>
struct WordOf<16> { using type = uint4; };

template <class Element>
constexpr int kMaxUnit = 16 / sizeof(Element);

// V neighbouring elements as they lie in memory, loaded at once and converted when they are used.
template <class Element, int V>
struct Unit {
  typename WordOf<V * sizeof(Element)>::type word;

  __device__ __forceinline__ const Element* elements() const { return reinterpret_cast<const Element*>(&word); }
  __device__ __forceinline__ float operator[](int e) const {
    if constexpr (std::is_same_v<Element, __nv_bfloat16> && V > 1) {  // one instruction an element, not two
      const uint32_t pair = reinterpret_cast<const uint32_t*>(&word)[e / 2];
      return bits_float(e % 2 ? pair & 0xFFFF0000u : pair << 16);
    } else {
      return to_float(elements()[e]);
    }
  }
};

template <int V, class Element>
__device__ __forceinline__ Unit<Element, V> load(const Element* source) {
  return *reinterpret_cast<const Unit<Element, V>*>(source);
}

template <int V, class Element>
__device__ __forceinline__ void store(Element* target, const float (&values)[V]) {
  Unit<Element, V> unit;
#pragma unroll
  for (int e = 0; e < V; ++e) reinterpret_cast<Element*>(&unit.word)[e] = from_float<Element>(values[e]);
  *reinterpret_cast<Unit<Element, V>*>(target) = unit;
}

// use(i, load(i)) from `begin` to `end`, in order, with kBatch loads on their way at a time: left to itself
// the compiler waits for each.
template <int kBatch, class Load, class Use>
__device__ __forceinline__ void in_batches(int begin, int end, Load load, Use use) {
  int first = begin;
#pragma unroll 1
  for (; end - first >= kBatch; first += kBatch) {
    decltype(load(0)) loaded[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) loaded[b] = load(first + b);
#pragma unroll
    for (int b = 0; b < kBatch; ++b) use(first + b, loaded[b]);
  }
  if constexpr (kBatch > 1) in_batches<kBatch / 2>(first, end, load, use);
}

// The slots of V channels.
template <int V>
struct Slots {
  Unit<uint8_t, V> unit;

  // Of a graph that is what it should be, a slot is below k; nothing else may reach memory.
  __device__ __forceinline__ int at(int e, int k) const { return min(int(unit.elements()[e]), k - 1); }

  // Whether channel e came from `slot`: one instruction a channel, once the words are compared.
  struct Equal {
    uint32_t difference[(V + 3) / 4];
    __device__ __forceinline__ bool operator[](int e) const {
      return (difference[e / 4] & (0xFFu << (8 * (e % 4)))) == 0;
    }
  };
  __device__ __forceinline__ Equal equal(int slot) const {
    const uint32_t repeated = static_cast<uint32_t>(slot) * 0x01010101u;
    Equal result;
    if constexpr (V == 8) {
      result.difference[0] = unit.word.x ^ repeated;
      result.difference[1] = unit.word.y ^ repeated;
    } else {
      result.difference[0] = unit.word ^ repeated;
    }
    return result;
  }
};

template <int V>
__device__ __forceinline__ Slots<V> load_slots(const uint8_t* source) {
  return {load<V>(source)};
}

template <int V>
__device__ __forceinline__ void store_slots(uint8_t* target, const int (&slots)[V]) {
  Unit<uint8_t, V> unit;
#pragma unroll
  for (int e = 0; e < V; ++e) reinterpret_cast<uint8_t*>(&unit.word)[e] = static_cast<uint8_t>(slots[e]);
  *reinterpret_cast<Unit<uint8_t, V>*>(target) = unit;
}

// Calls run() with `vector`, one of vector_for()'s answers, as a constant.
#define FER_WITH_VECTOR(qualifiers, name)                                                                          \
  template <class Element, class Run>                                                                              \
  qualifiers auto name(int vector, Run run) {                                                                      \
    if constexpr (kMaxUnit<Element> == 8) {                                                                        \
      if (vector == 8) return run(std::integral_constant<int, 8>{});                                               \
    }                                                                                                              \
    return vector == 4 ? run(std::integral_constant<int, 4>{}) : run(std::integral_constant<int, 1>{});            \
  }
FER_WITH_VECTOR(inline, with_vector)
FER_WITH_VECTOR(__device__ __forceinline__, in_vectors)
#undef FER_WITH_VECTOR

// ---------------------------------------------------------------------------------------------
// How work is cut

// Division of numbers below 2³¹ by one that is known before the launch.
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(int64_t divisor) {
    while ((int64_t(1) << (shift_ - 31)) < divisor) ++shift_;
    multiplier_ = static_cast<uint32_t>((uint64_t(1) << shift_) / std::max<int64_t>(1, divisor) + 1);
  }
  __device__ __forceinline__ int operator()(int dividend) const {
    return static_cast<int>((uint64_t(static_cast<uint32_t>(dividend)) * multiplier_) >> shift_);
  }

 private:
  uint32_t multiplier_ = 0;
  int shift_ = 31;
};

// A block's rows of one sample, and its group of heads or channels.
struct Place {
  int64_t sample;
  int64_t tile;  // among those of all samples
  int first, rows, group;
};

struct Tiling {
  int total, rows, tiles, groups;  // rows of a sample and of a tile; tiles and groups of a sample

  Tiling() = default;
  Tiling(int64_t batch, int64_t total_, int64_t groups_, int64_t max_rows)
      : total(static_cast<int>(total_)), groups(static_cast<int>(std::max<int64_t>(1, groups_))) {
    max_rows = std::max<int64_t>(1, max_rows);
    while (max_rows > 8 && batch * ceil_div(total_, max_rows) * groups < kEnoughBlocks) max_rows /= 2;
    tiles = static_cast<int>(std::max<int64_t>(1, ceil_div(total_, max_rows)));
    rows = static_cast<int>(ceil_div(total_, tiles));
    if (rows > 0) tiles = static_cast<int>(ceil_div(total_, rows));  // none is empty
  }
  int64_t blocks(int64_t batch) const { return total == 0 ? 0 : batch * tiles * groups; }

  __device__ __forceinline__ Place place() const {
    const unsigned tile = blockIdx.x / groups;
    Place place;
    place.sample = tile / tiles;
    place.tile = tile;
    place.first = static_cast<int>(tile % tiles) * rows;
    place.rows = min(rows, total - place.first);
    place.group = static_cast<int>(blockIdx.x % groups);
    return place;
  }
};

// As many threads as share `items` in as few rounds as there must be.
int threads_for(int64_t items) {
  const int64_t rounds = std::max<int64_t>(1, ceil_div(items, kMaxThreads));
  return static_cast<int>(std::max<int64_t>(1, ceil_div(items, 32 * rounds))) * 32;
}

// The most elements that may be one unit: never of two heads, which are `width` apart, and aligned.
template <class Element>
int vector_for(int64_t width, std::initializer_list<const void*> pointers, const uint8_t* slots = nullptr) {
  for (int vector = kMaxUnit<Element>; vector >= 4; vector /= 2) {
    const size_t bytes = vector * sizeof(Element);
    const auto aligned = [=](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; };
    if (width % vector == 0 && std::all_of(pointers.begin(), pointers.end(), aligned) &&
        reinterpret_cast<uintptr_t>(slots) % vector == 0) {
      return vector;
    }
  }
  return 1;
}

// `total` in equal chunks of at most kChunkChannels, by whole units.
int chunk_of(int64_t total) {
  const int64_t chunks = std::max<int64_t>(1, ceil_div(total, kChunkChannels));
  return static_cast<int>(std::max<int64_t>(1, ceil_div(ceil_div(total, chunks), 8))) * 8;
}

// What a block that computes scores has of each head, and how its items are numbered.
struct Sizes {
  int k, heads;                 // heads of a group
  int head_channels, channels;  // of a head, of a group
  int width, relation;          // the same of p, q and a
  int relation_vector;          // their unit
  Divisor by_k, by_heads, by_width;
};

// Heads of a group: a divisor of all, so that groups are alike.
int64_t group_heads(const RelationCall& call, int64_t shared_bytes_a_head) {
  int64_t best = 1;
  for (int64_t heads = 1; heads <= call.heads; ++heads) {
    if (call.heads % heads || heads * shared_bytes_a_head > kSharedBytes / 2) continue;
    best = heads;
    if (heads * (call.channels / call.heads) >= kGroupChannels) break;
  }
  return best;
}

template <class Element>
Sizes make_sizes(const RelationCall& call, int64_t heads, std::initializer_list<const void*> relation_pointers) {
  Sizes sizes = {};
  sizes.k = call.k;
  sizes.heads = static_cast<int>(heads);
  sizes.head_channels = static_cast<int>(call.channels / call.heads);
  sizes.channels = sizes.heads * sizes.head_channels;
  sizes.width = static_cast<int>(call.width);
  sizes.relation = sizes.heads * sizes.width;
  sizes.relation_vector = vector_for<Element>(call.width, relation_pointers);
  sizes.by_k = Divisor(call.k);
  sizes.by_heads = Divisor(heads);
  sizes.by_width = Divisor(call.width);
  return sizes;
}

// ---------------------------------------------------------------------------------------------
// Weights: of a block's rows and heads, in shared memory as [row][slot][head]

struct EdgeItem {
  int row, slot, head, edge;  // edge: row * k + slot
};

__device__ __forceinline__ EdgeItem edge_item(int item, const Sizes& sizes) {
  EdgeItem result;
  result.edge = sizes.by_heads(item);
  result.head = item - result.edge * sizes.heads;
  result.row = sizes.by_k(result.edge);
  result.slot = result.edge - result.row * sizes.k;
  return result;
}

// An index out of range reads some other row: the front checks where it is asked to.
__device__ __forceinline__ int clamp_key(int64_t key, int keys) {
  return static_cast<int>(max(int64_t(0), min(key, int64_t(keys) - 1)));
}

__device__ __forceinline__ void load_neighbours(int* neighbours, const RelationCall& call, const Place& place) {
  const int64_t* idx = call.idx + (place.sample * call.queries + place.first) * call.k;
  for (int edge = threadIdx.x; edge < place.rows * call.k; edge += blockDim.x) {
    neighbours[edge] = clamp_key(idx[edge], static_cast<int>(call.keys));
  }
}

// Where a block's part of p or dp starts, and of its sample's q or dq.
__device__ __forceinline__ int64_t relation_row(const RelationCall& call, const Sizes& sizes, const Place& place,
                                                int64_t rows, int row) {
  return (place.sample * rows + row) * call.heads * call.width + int64_t(place.group) * sizes.relation;
}

template <class Element>
__device__ __forceinline__ void score_edges(float* scores, const int* neighbours, const RelationCall& call,
                                            const Sizes& sizes, const Place& place) {
  const int stride = static_cast<int>(call.heads * call.width);
  const float slope = static_cast<float>(call.negative_slope);
  const Element* p = static_cast<const Element*>(call.p) + relation_row(call, sizes, place, call.queries, place.first);
  const Element* q = static_cast<const Element*>(call.q) + relation_row(call, sizes, place, call.keys, 0);
  const Element* a = static_cast<const Element*>(call.a) + int64_t(place.group) * sizes.relation;
  in_vectors<Element>(sizes.relation_vector, [&](auto vector) {
    constexpr int V = decltype(vector)::value;
    for (int item = threadIdx.x; item < place.rows * sizes.k * sizes.heads; item += blockDim.x) {
      const EdgeItem at = edge_item(item, sizes);
      const Element* p_row = p + at.row * stride + at.head * sizes.width;
      const Element* q_row = q + neighbours[at.edge] * stride + at.head * sizes.width;
      const Element* a_row = a + at.head * sizes.width;
      float score = 0;
#pragma unroll(V * sizeof(Element) == 16 ? 1 : 3)
      for (int r = 0; r < sizes.width; r += V) {
        const auto ps = load<V>(p_row + r), qs = load<V>(q_row + r), as = load<V>(a_row + r);
#pragma unroll
        for (int e = 0; e < V; ++e) score += as[e] * leaky_relu(ps[e] + qs[e], slope);
      }
      scores[item] = score;
    }
  });
}

// Scores become the softmax's numerators; its denominators go to [row][head].
__device__ __forceinline__ void exponentiate(float* scores, float* totals, const Sizes& sizes, int rows) {
  for (int item = threadIdx.x; item < rows * sizes.heads; item += blockDim.x) {
    const int row = sizes.by_heads(item);
    float* score = scores + row * sizes.k * sizes.heads + (item - row * sizes.heads);
    float highest = -INFINITY;
    for (int s = 0; s < sizes.k; ++s) highest = max_nan(highest, score[s * sizes.heads]);
    float total = 0;
    for (int s = 0; s < sizes.k; ++s) {
      const float power = expf(score[s * sizes.heads] - highest);
      score[s * sizes.heads] = power;
      total += power;
    }
    totals[item] = total;
  }
}

// What multiplies a slot's difference. Equal powers sum to k exactly, so it is exactly 1 in mode rmr where a = 0.
template <RelationMode kMode>
__device__ __forceinline__ float factor_of(float power, float total, int k) {
  return kMode == RelationMode::rmr ? power * (static_cast<float>(k) / total) : power / total;
}

// ---------------------------------------------------------------------------------------------
// Forward

struct ForwardProblem {
  RelationForward call;
  Tiling tiling;
  Sizes sizes;
  int units;  // of a group
  Divisor by_units;
};

// Numerators become factors, and the weights are written where they are wanted.
template <class Element, RelationMode kMode>
__device__ __forceinline__ void normalise(float* factors, const float* totals, const ForwardProblem& problem,
                                          const Place& place) {
  const RelationForward& call = problem.call;
  const Sizes& sizes = problem.sizes;
  const int64_t first_edge = (place.sample * call.queries + place.first) * call.k;
  for (int item = threadIdx.x; item < place.rows * sizes.k * sizes.heads; item += blockDim.x) {
    const EdgeItem at = edge_item(item, sizes);
    const float power = factors[item], total = totals[at.row * sizes.heads + at.head];
    factors[item] = factor_of<kMode>(power, total, sizes.k);
    if (call.weights) {
      const int64_t head = int64_t(place.group) * sizes.heads + at.head;
      static_cast<Element*>(call.weights)[(first_edge + at.edge) * call.heads + head] =
          from_float<Element>(power / total);
    }
  }
}

// One row's neighbours as seen from a unit of channels: `rows` starts at this unit of the sample's first.
template <class Element>
struct Neighbourhood {
  const Element* rows;
  const int* neighbours;
  const float* factors;
  int stride, factor_stride, k;

  template <int V>
  __device__ __forceinline__ Unit<Element, V> unit(int slot) const {
    return load<V>(rows + neighbours[slot] * stride);
  }
};

template <RelationMode kMode, class Element, int V>
__device__ __forceinline__ float candidate(const Neighbourhood<Element>& near, const Unit<Element, V>& unit, int slot,
                                           float centre, int e) {
  const float delta = unit[e] - centre;
  return kMode == RelationMode::rmr ? near.factors[slot * near.factor_stride] * delta : delta;
}

// The first slot that is NaN, for channels whose maximum is. Rare enough to walk again, and it keeps two
// instructions a channel out of the walk before.
template <RelationMode kMode, class Element, int V>
__device__ void find_nan(int (&winner)[V], const float (&best)[V], const float (&centre)[V],
                         const Neighbourhood<Element>& near) {
#pragma unroll 1
  for (int slot = near.k - 1; slot >= 0; --slot) {
    const auto unit = near.template unit<V>(slot);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float value = candidate<kMode>(near, unit, slot, centre[e], e);
      if (best[e] != best[e] && value != value) winner[e] = slot;
    }
  }
}

template <RelationMode kMode, bool kSlots, class Element, int V>
__device__ __forceinline__ void maximum(float (&best)[V], int (&winner)[V], const float (&centre)[V],
                                        const Neighbourhood<Element>& near) {
#pragma unroll
  for (int e = 0; e < V; ++e) best[e] = -INFINITY, winner[e] = 0;
  const auto load_unit = [&](int slot) { return near.template unit<V>(slot); };
  in_batches<kSlotBatch>(0, near.k, load_unit, [&](int slot, const Unit<Element, V>& unit) {
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const float value = candidate<kMode>(near, unit, slot, centre[e], e);
      if (kSlots && value > best[e]) winner[e] = slot;
      best[e] = max_nan(best[e], value);
    }
  });
  if constexpr (kSlots) {
    bool any = false;
#pragma unroll
    for (int e = 0; e < V; ++e) any |= best[e] != best[e];
    if (any) find_nan<kMode>(winner, best, centre, near);
  }
}

template <class Element, int V>
__device__ __forceinline__ void weighted_sum(float (&sum)[V], const float (&centre)[V],
                                             const Neighbourhood<Element>& near) {
#pragma unroll
  for (int e = 0; e < V; ++e) sum[e] = 0;
  const auto load_unit = [&](int slot) { return near.template unit<V>(slot); };
  in_batches<kSlotBatch>(0, near.k, load_unit, [&](int slot, const Unit<Element, V>& unit) {
    const float factor = near.factors[slot * near.factor_stride];
#pragma unroll
    for (int e = 0; e < V; ++e) sum[e] += factor * (unit[e] - centre[e]);
  });
}

template <class Element, RelationMode kMode, int V, bool kSlots>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerProcessor) forward_kernel(const ForwardProblem problem) {
  FER_DYNAMIC_SHARED(shared);
  const RelationForward& call = problem.call;
  const Sizes& sizes = problem.sizes;
  const Place place = problem.tiling.place();
  const int tile_edges = problem.tiling.rows * sizes.k;
  int* neighbours = reinterpret_cast<int*>(shared);
  float* factors = reinterpret_cast<float*>(neighbours + tile_edges);

  load_neighbours(neighbours, call, place);
  __syncthreads();
  if constexpr (kMode != RelationMode::mr) {
    float* totals = factors + tile_edges * sizes.heads;
    score_edges<Element>(factors, neighbours, call, sizes, place);
    __syncthreads();
    exponentiate(factors, totals, sizes, place.rows);
    __syncthreads();
    normalise<Element, kMode>(factors, totals, problem, place);
    __syncthreads();
  }

  const int channels = static_cast<int>(call.channels);
  const int64_t start = (place.sample * call.queries + place.first) * channels;
  const Element* keys = static_cast<const Element*>(call.y) + place.sample * call.keys * channels;
  for (int item = threadIdx.x; item < place.rows * problem.units; item += blockDim.x) {
    const int row = problem.by_units(item);
    const int channel_in_group = (item - row * problem.units) * V;
    const int channel = place.group * sizes.channels + channel_in_group;
    if (channel >= channels) continue;  // a group without heads may be short
    const int64_t offset = start + (row * channels + channel);
    const int head = kMode == RelationMode::mr ? 0 : channel_in_group / sizes.head_channels;
    const Neighbourhood<Element> near = {keys + channel,
                                         neighbours + row * sizes.k,
                                         factors + row * sizes.k * sizes.heads + head,
                                         channels,
                                         sizes.heads,
                                         sizes.k};
    const auto unit = load<V>(static_cast<const Element*>(call.x) + offset);
    float centre[V], result[V];
#pragma unroll
    for (int e = 0; e < V; ++e) centre[e] = unit[e];
    if constexpr (kMode == RelationMode::rsum) {
      weighted_sum(result, centre, near);
    } else {
      int winner[V];
      maximum<kMode, kSlots>(result, winner, centre, near);
      if constexpr (kSlots) store_slots(call.slots + offset, winner);
    }
    store(static_cast<Element*>(call.out) + offset, result);
  }
}

template <class Element, RelationMode kMode>
cudaError_t launch_forward(const RelationForward& call, cudaStream_t stream) {
  constexpr bool kHeads = kMode != RelationMode::mr;
  const int64_t row_bytes = int64_t(call.k) * 4, head_bytes = kHeads ? row_bytes + 4 : 0;
  const int64_t heads = group_heads(call, head_bytes);
  ForwardProblem problem = {};
  problem.call = call;
  problem.sizes = make_sizes<Element>(call, heads, {call.p, call.q, call.a});
  if (!kHeads) problem.sizes.channels = chunk_of(call.channels);
  const int64_t channels = problem.sizes.channels;
  const int64_t shared_row = row_bytes + heads * head_bytes;
  const int64_t groups = kHeads ? call.heads / heads : ceil_div(call.channels, channels);
  problem.tiling = Tiling(call.batch, call.queries, groups, std::min(kMaxRows, kSharedBytes / shared_row));
  const int vector = vector_for<Element>(call.channels / call.heads, {call.x, call.y, call.out}, call.slots);
  problem.units = static_cast<int>(channels / vector);
  problem.by_units = Divisor(problem.units);

  const int64_t rows = problem.tiling.rows;
  const int threads = threads_for(rows * problem.units);
  return with_vector<Element>(vector, [&](auto constant) {
    constexpr int V = decltype(constant)::value;
    const auto kernel = [&] {
      if constexpr (kMode != RelationMode::rsum) {
        if (call.slots) return &forward_kernel<Element, kMode, V, true>;
      }
      return &forward_kernel<Element, kMode, V, false>;
    }();
    return launch(kernel, problem.tiling.blocks(call.batch), threads, rows * shared_row, stream, problem);
  });
}

// ---------------------------------------------------------------------------------------------
// Reverse graph: a stable counting sort of each sample's edges by key
//
// A warp owns a run of edges and counts and places them in order; runs follow one another, so the place of
// an edge is that of its key, plus those of the runs before, plus those before it in the run. A block sorts
// a range of keys whose counts fit into shared memory, and finds out for itself how many edges go before.

constexpr int kSortWarps = 16;
constexpr int kSortKeys = 768;

struct SortProblem {
  const int64_t* idx;
  int32_t* reverse;
  int edges, keys, ranges;
};

// Walks the warp's run. Each edge of the block's keys is at the place that `next` has for its key, which
// moves on; visit(edge, place). Returns how many of this lane's edges belong to keys before the range.
template <class Visit>
__device__ __forceinline__ int walk_run(const SortProblem& problem, const int64_t* idx, int* next, int first_key,
                                        int count, Visit visit) {
  const int lane = lane_id();
  const int64_t run = (int64_t(problem.edges) + 32 * kSortWarps - 1) / (32 * kSortWarps) * 32;
  const int64_t begin = threadIdx.x / 32 * run, end = min(begin + run, int64_t(problem.edges));
  int before = 0;
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t edge = first + lane;
    int key = -1;
    if (edge < end) {
      key = clamp_key(idx[edge], problem.keys) - first_key;
      before += key < 0;
    }
    const bool inside = key >= 0 && key < count;
    const unsigned peers = __match_any_sync(kAllLanes, inside ? key : -1);
    const int place = (inside ? next[key] : 0) + __popc(peers & ((1u << lane) - 1));
    __syncwarp();  // all have read before the last of a key moves it on
    if (inside) {
      visit(static_cast<int>(edge), place);
      if (peers >> lane == 1) next[key] = place + 1;
    }
    __syncwarp();
  }
  return before;
}

__device__ __forceinline__ int warp_sum(int value) { return __reduce_add_sync(kAllLanes, value); }

// The exclusive sum of `value` over the block's threads, plus all of the threads' `offset`s.
__device__ __forceinline__ int block_scan(int value, int offset, int* scratch) {
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / 32;
  int inclusive = value;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane >= distance) inclusive += other;
  }
  const int offsets = warp_sum(offset);
  if (lane == 31) {
    scratch[warp] = inclusive;
    scratch[kSortWarps + warp] = offsets;
  }
  __syncthreads();
  int start = inclusive - value;
  for (int w = 0; w < kSortWarps; ++w) start += scratch[kSortWarps + w] + (w < warp ? scratch[w] : 0);
  return start;
}

__global__ void __launch_bounds__(32 * kSortWarps) reverse_kernel(const SortProblem problem) {
  FER_DYNAMIC_SHARED(shared);
  const int64_t sample = blockIdx.x / problem.ranges;
  const int first_key = static_cast<int>(blockIdx.x % problem.ranges) * kSortKeys;
  const int count = min(kSortKeys, problem.keys - first_key);
  const int64_t* idx = problem.idx + sample * problem.edges;
  int32_t* offsets = problem.reverse + sample * (int64_t(problem.keys) + 1 + problem.edges);
  int32_t* sorted = offsets + problem.keys + 1;
  int* scratch = reinterpret_cast<int*>(shared);
  int* counts = scratch + 2 * kSortWarps;  // [warp][key]
  int* mine = counts + threadIdx.x / 32 * count;

  for (int i = threadIdx.x; i < kSortWarps * count; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  const int before = walk_run(problem, idx, mine, first_key, count, [](int, int) {});
  __syncthreads();

  const int keys_a_thread = (count + static_cast<int>(blockDim.x) - 1) / static_cast<int>(blockDim.x);
  const int begin = min(count, static_cast<int>(threadIdx.x) * keys_a_thread);
  const int end = min(count, begin + keys_a_thread);
  int own = 0;
  for (int key = begin; key < end; ++key) {
    for (int w = 0; w < kSortWarps; ++w) own += counts[w * count + key];
  }
  int start = block_scan(own, before, scratch);
  for (int key = begin; key < end; ++key) {
    offsets[first_key + key] = start;
    for (int w = 0; w < kSortWarps; ++w) {
      const int edges = counts[w * count + key];
      counts[w * count + key] = start;
      start += edges;
    }
  }
  if (threadIdx.x == 0 && first_key + count == problem.keys) offsets[problem.keys] = problem.edges;
  __syncthreads();
  walk_run(problem, idx, mine, first_key, count, [&](int edge, int place) { sorted[place] = edge; });
}

// The edges that end in a key, of a sample. Whatever the memory holds, they are edges of this sample.
struct Incoming {
  const int32_t* edges;
  int begin, end, last;

  __device__ __forceinline__ Incoming(const RelationBackward& call, int64_t sample, int key) {
    const int total = static_cast<int>(call.queries * call.k);
    const int32_t* offsets = call.reverse + sample * (call.keys + 1 + total);
    edges = offsets + call.keys + 1;
    begin = max(0, min(offsets[key], total));
    end = max(0, min(offsets[key + 1], total));
    last = total - 1;
  }
  __device__ __forceinline__ int at(int i) const { return max(0, min(edges[i], last)); }
};

// ---------------------------------------------------------------------------------------------
// Backward of rows: dp, what a block knows of da, and for the kernels that gather along edges
// ∂score and the factors, both [head][sample][row][slot]

struct RowsProblem {
  RelationBackward call;
  Tiling tiling;
  Sizes sizes;
  int chunk, units;  // of channels staged at once
  int relation_chunk, relation_units;
  int stage_bytes, row_bytes;  // of shared memory: first the stage, then a row's share of the rest
  Divisor by_units, by_relation_units;
  float* factors;      // null if the nodes' gradient is not wanted
  float* score_grads;  // null if the relation's is not
  float* da_parts;     // [tile of any sample][head][width]
};

// The start of a block's rows in such an array, for the group's first head; heads are `call_edges` apart.
__device__ __forceinline__ int64_t first_edge(const RelationCall& call, const Sizes& sizes, const Place& place) {
  return ((int64_t(place.group) * sizes.heads * call.batch + place.sample) * call.queries + place.first) * call.k;
}
__device__ __forceinline__ int64_t call_edges(const RelationCall& call) { return call.batch * call.queries * call.k; }

// Numerators become alpha, and what it is to be added to becomes grad_weights.
template <class Element, RelationMode kMode>
__device__ __forceinline__ void start_gradients(float* alphas, float* alpha_grads, const float* totals,
                                                const RowsProblem& problem, const Place& place) {
  const RelationBackward& call = problem.call;
  const Sizes& sizes = problem.sizes;
  const int64_t start = first_edge(call, sizes, place);
  const int64_t first_weight = (place.sample * call.queries + place.first) * call.k;
  for (int item = threadIdx.x; item < place.rows * sizes.k * sizes.heads; item += blockDim.x) {
    const EdgeItem at = edge_item(item, sizes);
    const float power = alphas[item], total = totals[at.row * sizes.heads + at.head];
    alphas[item] = power / total;
    const int64_t head = int64_t(place.group) * sizes.heads + at.head;
    alpha_grads[item] =
        call.grad_weights
            ? to_float(static_cast<const Element*>(call.grad_weights)[(first_weight + at.edge) * call.heads + head])
            : 0.0f;
    if (problem.factors) {
      problem.factors[start + at.head * call_edges(call) + at.edge] = factor_of<kMode>(power, total, sizes.k);
    }
  }
}

// A chunk's channels of one head, as they lie in the chunk.
struct Span {
  int begin, end;
  __device__ __forceinline__ Span(const RowsProblem& problem, int head, int chunk_start)
      : begin(max(0, head * problem.sizes.head_channels - chunk_start)),
        end(min(min(problem.chunk, problem.sizes.channels - chunk_start),
                (head + 1) * problem.sizes.head_channels - chunk_start)) {}
};

// ∂alpha where a maximum was taken: each channel has something for the slot that won it.
template <class Element, int V>
struct WonChannels {
  static constexpr int kPadding = 4;  // keeps 16-byte reads of neighbouring rows on different banks
  static constexpr int kWalk = V < 4 ? V : 4;

  float* won;
  uint8_t* slots;
  int stride;

  static int64_t row_bytes(int, int chunk) { return (chunk + kPadding) * 4 + chunk; }
  __device__ __forceinline__ WonChannels(void* stage, const RowsProblem& problem)
      : won(static_cast<float*>(stage)), stride(problem.chunk + kPadding) {
    slots = reinterpret_cast<uint8_t*>(won + problem.tiling.rows * stride);
  }

  // A unit of a row, `channel` within the chunk; `x` and `grad` are at the unit, `keys` at that of the sample's first.
  __device__ __forceinline__ void stage(const RowsProblem& problem, const int* neighbours, int row, int channel,
                                        const Element* x, const Element* grad, const Element* keys,
                                        const uint8_t* call_slots) const {
    const auto centre = load<V>(x), grads = load<V>(grad);
    const auto winners = load_slots<V>(call_slots);
    const int channels = static_cast<int>(problem.call.channels);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const int key = neighbours[row * problem.sizes.k + winners.at(e, problem.sizes.k)];
      const float delta = to_float(keys[key * channels + e]) - centre[e];
      won[row * stride + channel + e] = static_cast<float>(problem.sizes.k) * grads[e] * delta;
    }
    *reinterpret_cast<Unit<uint8_t, V>*>(slots + row * problem.chunk + channel) = winners.unit;
  }

  __device__ __forceinline__ float sum(const RowsProblem& problem, const EdgeItem& at, Span span) const {
    float sum = 0;
    for (int c = span.begin; c < span.end; c += kWalk) {
      const auto values = load<kWalk>(static_cast<const float*>(won) + at.row * stride + c);
      const auto equal = load_slots<kWalk>(slots + at.row * problem.chunk + c).equal(at.slot);
#pragma unroll
      for (int e = 0; e < kWalk; ++e) {
        if (equal[e]) sum += values[e];
      }
    }
    return sum;
  }
};

// ∂alpha of a weighted sum: grad · δ, a unit at a time.
template <class Element, int V>
struct UnitProducts {
  float* products;  // [row][slot][unit]

  static int64_t row_bytes(int k, int chunk) { return int64_t(k) * (chunk / V) * 4; }
  __device__ __forceinline__ UnitProducts(void* stage, const RowsProblem&) : products(static_cast<float*>(stage)) {}

  __device__ __forceinline__ void stage(const RowsProblem& problem, const int* neighbours, int row, int channel,
                                        const Element* x, const Element* grad, const Element* keys,
                                        const uint8_t*) const {
    const auto unit = load<V>(x), grads = load<V>(grad);
    const int channels = static_cast<int>(problem.call.channels);
    const int first = row * problem.sizes.k;
    const auto load_unit = [&](int edge) { return load<V>(keys + neighbours[edge] * channels); };
    in_batches<kSlotBatch>(first, first + problem.sizes.k, load_unit, [&](int edge, const Unit<Element, V>& neighbour) {
      float product = 0;
#pragma unroll
      for (int e = 0; e < V; ++e) product += (neighbour[e] - unit[e]) * grads[e];
      products[edge * problem.units + channel / V] = product;
    });
  }

  __device__ __forceinline__ float sum(const RowsProblem& problem, const EdgeItem& at, Span span) const {
    float sum = 0;
    for (int unit = span.begin / V; unit < span.end / V; ++unit) sum += products[at.edge * problem.units + unit];
    return sum;
  }
};

template <class Stage, class Element, int V>
__device__ __forceinline__ void add_alpha_gradients(float* alpha_grads, void* stage_memory, const int* neighbours,
                                                    const RowsProblem& problem, const Place& place) {
  const RelationBackward& call = problem.call;
  const Sizes& sizes = problem.sizes;
  const Stage stage(stage_memory, problem);
  const int64_t channels = call.channels, group_start = int64_t(place.group) * sizes.channels;
  const int64_t start = (place.sample * call.queries + place.first) * channels + group_start;
  const Element* x = static_cast<const Element*>(call.x) + start;
  const Element* grad = static_cast<const Element*>(call.grad) + start;
  const Element* keys = static_cast<const Element*>(call.y) + place.sample * call.keys * channels + group_start;
  for (int chunk = 0; chunk < sizes.channels; chunk += problem.chunk) {
    for (int item = threadIdx.x; item < place.rows * problem.units; item += blockDim.x) {
      const int row = problem.by_units(item);
      const int channel = (item - row * problem.units) * V;
      if (chunk + channel >= sizes.channels) continue;
      const int64_t offset = row * channels + chunk + channel;
      stage.stage(problem, neighbours, row, channel, x + offset, grad + offset, keys + chunk + channel,
                  call.slots + (call.slots ? start + offset : 0));
    }
    __syncthreads();
    for (int item = threadIdx.x; item < place.rows * sizes.k * sizes.heads; item += blockDim.x) {
      const EdgeItem at = edge_item(item, sizes);
      alpha_grads[item] += stage.sum(problem, at, Span(problem, at.head, chunk));
    }
    __syncthreads();
  }
}

// ∂alpha becomes ∂score.
__device__ __forceinline__ void softmax_backward(float* alpha_grads, const float* alphas, const Sizes& sizes,
                                                 int rows) {
  for (int item = threadIdx.x; item < rows * sizes.heads; item += blockDim.x) {
    const int row = sizes.by_heads(item);
    const int first = row * sizes.k * sizes.heads + (item - row * sizes.heads);
    float total = 0;
    for (int s = 0; s < sizes.k; ++s) total += alphas[first + s * sizes.heads] * alpha_grads[first + s * sizes.heads];
    for (int s = 0; s < sizes.k; ++s) {
      const int at = first + s * sizes.heads;
      alpha_grads[at] = alphas[at] * (alpha_grads[at] - total);
    }
  }
}

// dp, and da summed over the block's rows.
template <class Element>
__device__ __forceinline__ void relation_gradients(const float* score_grads, float* stage, const int* neighbours,
                                                   const RowsProblem& problem, const Place& place) {
  const RelationBackward& call = problem.call;
  const Sizes& sizes = problem.sizes;
  const int stride = static_cast<int>(call.heads * call.width);
  const float slope = static_cast<float>(call.negative_slope);
  const int64_t p_start = relation_row(call, sizes, place, call.queries, place.first);
  const Element* q = static_cast<const Element*>(call.q) + relation_row(call, sizes, place, call.keys, 0);
  const int64_t a_start = int64_t(place.group) * sizes.relation;
  for (int chunk = 0; chunk < sizes.relation; chunk += problem.relation_chunk) {
    in_vectors<Element>(sizes.relation_vector, [&](auto vector) {
      constexpr int V = decltype(vector)::value;
      for (int item = threadIdx.x; item < place.rows * problem.relation_units; item += blockDim.x) {
        const int row = problem.by_relation_units(item);
        const int staged = (item - row * problem.relation_units) * V;
        const int column = chunk + staged;
        if (column >= sizes.relation) continue;
        const int head = sizes.by_width(column);
        const int64_t offset = p_start + int64_t(row) * stride + column;
        const auto ps = load<V>(static_cast<const Element*>(call.p) + offset);
        const auto as = load<V>(static_cast<const Element*>(call.a) + a_start + column);
        float dp[V] = {}, da[V] = {};
        const int first = row * sizes.k;
        const Element* q_column = q + column;
        const auto load_unit = [&](int edge) { return load<V>(q_column + neighbours[edge] * stride); };
        in_batches<kSlotBatch>(first, first + sizes.k, load_unit, [&](int edge, const Unit<Element, V>& qs) {
          const float score_grad = score_grads[edge * sizes.heads + head];
#pragma unroll
          for (int e = 0; e < V; ++e) {
            const float z = ps[e] + qs[e];
            dp[e] += leaky_gradient(z, score_grad * as[e], slope);
            da[e] += score_grad * leaky_relu(z, slope);
          }
        });
        store(static_cast<Element*>(call.dp) + offset, dp);
#pragma unroll
        for (int e = 0; e < V; ++e) stage[row * problem.relation_chunk + staged + e] = da[e];
      }
    });
    __syncthreads();
    for (int c = threadIdx.x; c < min(problem.relation_chunk, sizes.relation - chunk); c += blockDim.x) {
      float sum = 0;
      for (int row = 0; row < place.rows; ++row) sum += stage[row * problem.relation_chunk + c];
      problem.da_parts[place.tile * stride + a_start + chunk + c] = sum;
    }
    __syncthreads();
  }
}

template <class Element, RelationMode kMode, int V>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerProcessor) backward_rows_kernel(const RowsProblem problem) {
  FER_DYNAMIC_SHARED(shared);
  using Stage = std::conditional_t<kMode == RelationMode::rmr, WonChannels<Element, V>, UnitProducts<Element, V>>;
  const RelationBackward& call = problem.call;
  const Sizes& sizes = problem.sizes;
  const Place place = problem.tiling.place();
  const int tile_edges = problem.tiling.rows * sizes.k;
  int* neighbours = reinterpret_cast<int*>(shared + problem.stage_bytes);
  float* alphas = reinterpret_cast<float*>(neighbours + tile_edges);
  float* alpha_grads = alphas + tile_edges * sizes.heads;
  float* totals = alpha_grads + tile_edges * sizes.heads;

  load_neighbours(neighbours, call, place);
  __syncthreads();
  score_edges<Element>(alphas, neighbours, call, sizes, place);
  __syncthreads();
  exponentiate(alphas, totals, sizes, place.rows);
  __syncthreads();
  start_gradients<Element, kMode>(alphas, alpha_grads, totals, problem, place);
  if (!problem.score_grads) return;
  __syncthreads();
  add_alpha_gradients<Stage, Element, V>(alpha_grads, shared, neighbours, problem, place);
  softmax_backward(alpha_grads, alphas, sizes, place.rows);
  __syncthreads();
  const int64_t start = first_edge(call, sizes, place);
  for (int item = threadIdx.x; item < place.rows * sizes.k * sizes.heads; item += blockDim.x) {
    const EdgeItem at = edge_item(item, sizes);
    problem.score_grads[start + at.head * call_edges(call) + at.edge] = alpha_grads[item];
  }
  relation_gradients<Element>(alpha_grads, reinterpret_cast<float*>(shared), neighbours, problem, place);
}

// ---------------------------------------------------------------------------------------------
// Backward of keys: dq

struct KeysProblem {
  RelationBackward call;
  Tiling tiling;
  int vector, units;  // of a row of q
  Divisor by_units, by_k;
  const float* score_grads;
};

template <class Element>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerProcessor) backward_keys_kernel(const KeysProblem problem) {
  const RelationBackward& call = problem.call;
  const Place place = problem.tiling.place();
  const int width = static_cast<int>(call.width), stride = static_cast<int>(call.heads) * width;
  const int64_t sample_edges = call.queries * call.k;
  const float slope = static_cast<float>(call.negative_slope);
  const Element* p = static_cast<const Element*>(call.p) + place.sample * call.queries * stride;
  in_vectors<Element>(problem.vector, [&](auto vector) {
    constexpr int V = decltype(vector)::value;
    for (int item = threadIdx.x; item < place.rows * problem.units; item += blockDim.x) {
      const int row = problem.by_units(item);
      const int column = (item - row * problem.units) * V;
      const int64_t offset = (place.sample * call.keys + place.first + row) * stride + column;
      const float* score_grads =
          problem.score_grads + (int64_t(column / width) * call.batch + place.sample) * sample_edges;
      const Incoming incoming(call, place.sample, place.first + row);
      const auto qs = load<V>(static_cast<const Element*>(call.q) + offset);
      const auto as = load<V>(static_cast<const Element*>(call.a) + column);
      float dq[V] = {};
      struct Edge {
        Unit<Element, V> ps;
        float score_grad;
      };
      const auto load_edge = [&](int i) {
        const int edge = incoming.at(i);
        return Edge{load<V>(p + problem.by_k(edge) * stride + column), score_grads[edge]};
      };
      in_batches<kEdgeBatch>(incoming.begin, incoming.end, load_edge, [&](int, const Edge& edge) {
#pragma unroll
        for (int e = 0; e < V; ++e) dq[e] += leaky_gradient(edge.ps[e] + qs[e], edge.score_grad * as[e], slope);
      });
      store(static_cast<Element*>(call.dq) + offset, dq);
    }
  });
}

// ---------------------------------------------------------------------------------------------
// Backward of da: block partials, summed kSlab to one until one is left

constexpr int kSlab = 256;
constexpr int kSumWarps = 8;

template <class Out>
__global__ void __launch_bounds__(32 * kSumWarps)
sum_parts_kernel(const float* parts, int64_t count, int columns, int column_blocks, Out* sums) {
  FER_DYNAMIC_SHARED(shared);
  float* warp_sums = reinterpret_cast<float*>(shared);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = lane_id();
  const int column = static_cast<int>(blockIdx.x % column_blocks) * 32 + lane;
  const int64_t slab = blockIdx.x / column_blocks;
  const int64_t end = min(count, (slab + 1) * kSlab);
  float sum = 0;
  if (column < columns) {
#pragma unroll 8
    for (int64_t part = slab * kSlab + warp; part < end; part += kSumWarps) sum += parts[part * columns + column];
  }
  warp_sums[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || column >= columns) return;
  for (int w = 1; w < kSumWarps; ++w) sum += warp_sums[32 * w + lane];
  sums[slab * columns + column] = from_float<Out>(sum);
}

template <class Out>
cudaError_t launch_sum(const float* parts, int64_t count, int columns, Out* sums, cudaStream_t stream) {
  const int column_blocks = static_cast<int>(ceil_div(columns, 32));
  const int64_t slabs = std::max<int64_t>(1, ceil_div(count, kSlab));  // no parts at all make zeros
  return launch(sum_parts_kernel<Out>, slabs * column_blocks, 32 * kSumWarps, 32 * kSumWarps * sizeof(float), stream,
                parts, count, columns, column_blocks, sums);
}

// Each round's sums follow its parts in memory.
template <class Element>
cudaError_t launch_sums(float* parts, int64_t count, int columns, Element* sums, cudaStream_t stream) {
  while (count > kSlab) {
    float* next = parts + count * columns;
    const cudaError_t error = launch_sum(parts, count, columns, next, stream);
    if (error != cudaSuccess) return error;
    parts = next;
    count = ceil_div(count, kSlab);
  }
  return launch_sum(parts, count, columns, sums, stream);
}

int64_t parts_with_sums(int64_t count) {
  int64_t all = count;
  for (; count > kSlab; all += count) count = ceil_div(count, kSlab);
  return all;
}

// ---------------------------------------------------------------------------------------------
// Backward of nodes: dx and dy
//
// A neighbour's gradient is gathered along its edges, from centres that it may not have won: k times what
// scattering to the winners would read, but from L1, and with as many threads as there are units rather
// than as many columns as fit into shared memory.

struct NodesProblem {
  RelationBackward call;
  Tiling tiling;        // over keys, then over centres unless they are the keys
  int channels, units;  // of a group
  Divisor by_units, by_k;
  int head_channels;
  const float* factors;
};

template <class Element, RelationMode kMode, int V>
struct NodeGradient {
  static constexpr bool kFactors = kMode != RelationMode::mr;

  const Element* grads;  // of the sample, like the two that follow
  const uint8_t* slots;
  const float* factors;  // and of the head
  Divisor by_k;
  int channels, channel, k;

  // Of this unit in the sample's tensors of centres: grad, slots and dx.
  __device__ __forceinline__ int offset(int row) const { return row * channels + channel; }
  __device__ __forceinline__ Unit<Element, V> grad(int row) const { return load<V>(grads + offset(row)); }

  struct Edge {
    Unit<Element, V> grads;
    Slots<V> slots;
    int slot;
    float factor;
  };
  __device__ __forceinline__ Edge load_edge(int edge) const {
    const int row = by_k(edge);
    Edge loaded = {};
    loaded.grads = grad(row);
    if constexpr (kFactors) loaded.factor = factors[edge];
    if constexpr (kMode != RelationMode::rsum) {
      loaded.slots = load_slots<V>(slots + offset(row));
      loaded.slot = edge - row * k;
    }
    return loaded;
  }

  __device__ __forceinline__ void add_as_neighbour(float (&sum)[V], const Incoming& incoming) const {
    const auto load_one = [&](int i) { return load_edge(incoming.at(i)); };
    in_batches<kEdgeBatch>(incoming.begin, incoming.end, load_one, [&](int, const Edge& edge) {
      const auto equal = edge.slots.equal(edge.slot);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const float part = kFactors ? edge.factor * edge.grads[e] : edge.grads[e];
        if (kMode == RelationMode::rsum || equal[e]) sum[e] += part;
      }
    });
  }

  __device__ __forceinline__ void subtract_as_centre(float (&sum)[V], int row) const {
    const auto own = grad(row);
    if constexpr (kMode == RelationMode::rsum) {
      for (int slot = 0; slot < k; ++slot) {
        const float factor = factors[row * k + slot];
#pragma unroll
        for (int e = 0; e < V; ++e) sum[e] -= factor * own[e];
      }
    } else if constexpr (kMode == RelationMode::rmr) {
      const auto winners = load_slots<V>(slots + offset(row));
#pragma unroll
      for (int e = 0; e < V; ++e) sum[e] -= factors[row * k + winners.at(e, k)] * own[e];
    } else {
#pragma unroll
      for (int e = 0; e < V; ++e) sum[e] -= own[e];
    }
  }
};

template <class Element, RelationMode kMode, int V>
__global__ void __launch_bounds__(kMaxThreads, kBlocksPerProcessor) backward_nodes_kernel(const NodesProblem problem) {
  const RelationBackward& call = problem.call;
  const Place place = problem.tiling.place();
  const int keys = static_cast<int>(call.keys), channels = static_cast<int>(call.channels);
  const int64_t centres = place.sample * call.queries * channels;  // where the sample starts
  Element* dx = static_cast<Element*>(call.dx) + centres;
  for (int item = threadIdx.x; item < place.rows * problem.units; item += blockDim.x) {
    const int row_in_tile = problem.by_units(item);
    const int channel = place.group * problem.channels + (item - row_in_tile * problem.units) * V;
    if (channel >= channels) continue;
    const auto factors = [&] {
      const int64_t head = channel / problem.head_channels;
      return problem.factors + (head * call.batch + place.sample) * call.queries * call.k;
    };
    const NodeGradient<Element, kMode, V> node = {
        static_cast<const Element*>(call.grad) + centres,
        call.slots + (kMode == RelationMode::rsum ? 0 : centres),
        kMode == RelationMode::mr ? nullptr : factors(),
        problem.by_k,
        channels,
        channel,
        call.k};
    const int row = place.first + row_in_tile;
    float sum[V] = {};
    if (row < keys) node.add_as_neighbour(sum, Incoming(call, place.sample, row));
    if (call.own_keys) {
      node.subtract_as_centre(sum, row);
      store(dx + node.offset(row), sum);
    } else if (row < keys) {
      store(static_cast<Element*>(call.dy) + place.sample * keys * channels + node.offset(row), sum);
    } else {
      node.subtract_as_centre(sum, row - keys);
      store(dx + node.offset(row - keys), sum);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Backward, from the host

// What the kernels hand to each other, in the workspace.
struct Scratch {
  float *factors = nullptr, *score_grads = nullptr, *da_parts = nullptr;
  size_t bytes = 0;

  Scratch(const RelationBackward& call, const Tiling& tiling, void* workspace) {
    const auto take = [&](bool wanted, int64_t floats) -> float* {
      if (!wanted) return nullptr;
      float* part = reinterpret_cast<float*>(static_cast<unsigned char*>(workspace) + bytes);
      bytes += static_cast<size_t>(floats) * sizeof(float);
      return part;
    };
    const int64_t edges = call.batch * call.queries * call.k * call.heads;
    factors = take(call.need_nodes && call.mode != RelationMode::mr, edges);
    score_grads = take(call.need_relation, edges);
    da_parts = take(call.need_relation, parts_with_sums(call.batch * tiling.tiles) * call.heads * call.width);
  }
};

template <class Element, RelationMode kMode, int V>
RowsProblem rows_problem(const RelationBackward& call, void* workspace) {
  using Stage = std::conditional_t<kMode == RelationMode::rmr, WonChannels<Element, V>, UnitProducts<Element, V>>;
  const int64_t k_bytes = int64_t(call.k) * 4;
  const int64_t heads = group_heads(call, 2 * k_bytes + 4);
  RowsProblem problem = {};
  problem.call = call;
  problem.sizes = make_sizes<Element>(call, heads, {call.p, call.q, call.a, call.dp});
  problem.chunk = chunk_of(problem.sizes.channels);
  problem.units = problem.chunk / V;
  problem.by_units = Divisor(problem.units);
  problem.relation_chunk = chunk_of(problem.sizes.relation);
  problem.relation_units = problem.relation_chunk / problem.sizes.relation_vector;
  problem.by_relation_units = Divisor(problem.relation_units);
  const int64_t stage_row =
      call.need_relation ? std::max(Stage::row_bytes(call.k, problem.chunk), int64_t(problem.relation_chunk) * 4) : 0;
  problem.row_bytes = static_cast<int>(k_bytes + heads * (2 * k_bytes + 4));
  problem.tiling = Tiling(call.batch, call.queries, call.heads / heads,
                          std::min(kMaxRows, kSharedBytes / (problem.row_bytes + stage_row)));
  problem.stage_bytes = static_cast<int>(ceil_div(stage_row * problem.tiling.rows, 16) * 16);
  const Scratch scratch(call, problem.tiling, workspace);
  problem.factors = scratch.factors;
  problem.score_grads = scratch.score_grads;
  problem.da_parts = scratch.da_parts;
  return problem;
}

template <class Element>
int node_vector(const RelationBackward& call) {
  const int64_t width = call.channels / call.heads;
  return vector_for<Element>(width, {call.x, call.y, call.grad, call.dx, call.dy}, call.slots);
}

template <class Element, RelationMode kMode, int V>
cudaError_t launch_rows(const RelationBackward& call, void* workspace, cudaStream_t stream) {
  const RowsProblem problem = rows_problem<Element, kMode, V>(call, workspace);
  const int64_t rows = problem.tiling.rows;
  const int64_t items = rows * std::max(problem.units, problem.sizes.k * problem.sizes.heads);
  const cudaError_t error =
      launch(backward_rows_kernel<Element, kMode, V>, problem.tiling.blocks(call.batch), threads_for(items),
             problem.stage_bytes + rows * problem.row_bytes, stream, problem);
  if (error != cudaSuccess || !call.need_relation) return error;

  KeysProblem keys = {};
  keys.call = call;
  keys.score_grads = problem.score_grads;
  keys.by_k = Divisor(call.k);
  keys.vector = vector_for<Element>(call.width, {call.p, call.q, call.a, call.dq});
  keys.units = static_cast<int>(call.heads * call.width / keys.vector);
  keys.by_units = Divisor(keys.units);
  keys.tiling = Tiling(call.batch, call.keys, 1, kMaxRows);
  if (keys.units > 0) {
    const cudaError_t error = launch(backward_keys_kernel<Element>, keys.tiling.blocks(call.batch),
                                     threads_for(int64_t(keys.tiling.rows) * keys.units), 0, stream, keys);
    if (error != cudaSuccess) return error;
  }
  const int64_t parts = call.queries == 0 ? 0 : call.batch * problem.tiling.tiles;
  return launch_sums(problem.da_parts, parts, static_cast<int>(call.heads * call.width),
                     static_cast<Element*>(call.da), stream);
}

template <class Element, RelationMode kMode, int V>
cudaError_t launch_nodes(const RelationBackward& call, const float* factors, cudaStream_t stream) {
  NodesProblem problem = {};
  problem.call = call;
  problem.factors = factors;
  problem.by_k = Divisor(call.k);
  problem.channels = chunk_of(call.channels);
  problem.units = problem.channels / V;
  problem.by_units = Divisor(problem.units);
  problem.head_channels = static_cast<int>(call.channels / call.heads);
  problem.tiling = Tiling(call.batch, call.own_keys ? call.keys : call.keys + call.queries,
                          ceil_div(call.channels, problem.channels), 2 * kMaxRows);
  return launch(backward_nodes_kernel<Element, kMode, V>, problem.tiling.blocks(call.batch),
                threads_for(int64_t(problem.tiling.rows) * problem.units), 0, stream, problem);
}

template <class Element, RelationMode kMode, int V>
cudaError_t launch_backward(const RelationBackward& call, void* workspace, cudaStream_t stream) {
  const float* factors = nullptr;
  if constexpr (kMode != RelationMode::mr) {
    factors = static_cast<const float*>(workspace);  // the first of Scratch
    const cudaError_t error = launch_rows<Element, kMode, V>(call, workspace, stream);
    if (error != cudaSuccess) return error;
  }
  return call.need_nodes && call.channels > 0 ? launch_nodes<Element, kMode, V>(call, factors, stream) : cudaSuccess;
}

// ---------------------------------------------------------------------------------------------

template <RelationMode kMode>
using Mode = std::integral_constant<RelationMode, kMode>;

// Calls run() with an element and the mode, as constants.
template <class Run>
auto with_types(const RelationCall& call, Run run) {
  const auto with_mode = [&](auto element) {
    switch (call.mode) {
      case RelationMode::mr:
        return run(element, Mode<RelationMode::mr>{});
      case RelationMode::rmr:
        return run(element, Mode<RelationMode::rmr>{});
      default:
        return run(element, Mode<RelationMode::rsum>{});
    }
  };
  switch (call.dtype) {
    case Dtype::bf16:
      return with_mode(__nv_bfloat16{});
    case Dtype::f16:
      return with_mode(__half{});
    default:
      return with_mode(float{});
  }
}

bool is_valid(const RelationCall& call) {
  return call.dtype != Dtype::f64 && call.k >= 1 && call.k <= 128 && call.heads >= 1 &&
         call.channels % call.heads == 0 && call.channels <= INT32_MAX && call.heads * call.width <= INT32_MAX &&
         call.keys + call.queries <= INT32_MAX && call.queries * call.k <= INT32_MAX &&
         // Within a sample, offsets are 32-bit.
         std::max(call.keys, call.queries) * std::max(call.channels, call.heads * call.width) <= INT32_MAX &&
         (call.keys > 0 || call.batch * call.queries == 0);
}

}  // namespace

cudaError_t relation(const RelationForward& call, cudaStream_t stream) {
  if (!is_valid(call)) return cudaErrorInvalidValue;
  return with_types(call, [&](auto element, auto mode) {
    return launch_forward<decltype(element), decltype(mode)::value>(call, stream);
  });
}

size_t relation_backward_workspace_bytes(const RelationBackward& call) {
  if (!is_valid(call) || call.mode == RelationMode::mr) return 0;
  return with_types(call, [&](auto element, auto mode) -> size_t {
    using Element = decltype(element);
    constexpr RelationMode kMode = decltype(mode)::value;
    if constexpr (kMode == RelationMode::mr) {
      return 0;
    } else {
      return with_vector<Element>(node_vector<Element>(call), [&](auto vector) {
        const RowsProblem problem = rows_problem<Element, kMode, decltype(vector)::value>(call, nullptr);
        return Scratch(call, problem.tiling, nullptr).bytes;
      });
    }
  });
}

bool relation_backward_needs_reverse(const RelationBackward& call) { return call.need_nodes || call.need_relation; }

cudaError_t relation_backward(const RelationBackward& call, void* workspace, cudaStream_t stream) {
  if (!is_valid(call)) return cudaErrorInvalidValue;
  return with_types(call, [&](auto element, auto mode) {
    using Element = decltype(element);
    return with_vector<Element>(node_vector<Element>(call), [&](auto vector) {
      return launch_backward<Element, decltype(mode)::value, decltype(vector)::value>(call, workspace, stream);
    });
  });
}

cudaError_t relation_reverse(const int64_t* idx, int64_t batch, int64_t queries, int64_t keys, int k, int32_t* reverse,
                             cudaStream_t stream) {
  if (keys < 0 || keys + kSortKeys > INT32_MAX || queries * k > INT32_MAX) return cudaErrorInvalidValue;
  SortProblem problem = {};
  problem.idx = idx;
  problem.reverse = reverse;
  problem.edges = static_cast<int>(keys == 0 ? 0 : queries * k);
  problem.keys = static_cast<int>(keys);
  problem.ranges = static_cast<int>(std::max<int64_t>(1, ceil_div(keys, kSortKeys)));
  const int64_t counts = kSortWarps * std::min<int64_t>(keys, kSortKeys) + 2 * kSortWarps;
  return launch(reverse_kernel, batch * problem.ranges, 32 * kSortWarps, counts * sizeof(int), stream, problem);
}

}  // namespace fer::cuda
