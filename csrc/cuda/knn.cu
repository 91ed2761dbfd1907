// knn on a GPU. fer_kernels/knn/reference.py says what it computes.
//
// A block owns a few queries of one sample and walks over the keys a tile at a time:
//
//   stage     queries and keys, 128 bytes of channels at a time, into shared memory
//   multiply  x_i . y_j on the tensor cores, float32 sums in registers
//   write     |y_j|² - 2 x_i . y_j + bias_ij, as an ordered integer, into shared memory
//   offer     each warp takes four queries and keeps their nearest so far on a shortlist
//
// and at the end sorts the shortlists and writes the positions asked for. Selection costs several
// times the product at ViG's sizes, so it decides the shape of a block: 7 warps of 4 queries. The 196
// nodes of ViG then make 7 whole blocks, and are one tile of 7 keys a lane.
#include "kernels.h"

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "fer/launch.h"
#include "fer/order.h"
#include "fer/tensor_core.h"

namespace fer::cuda {
namespace {

constexpr unsigned kAllLanes = 0xFFFFFFFFu;
constexpr int kChunkBytes = 128;  // of a row that are staged at once: all 32 banks
constexpr int kUnitBytes = 16;    // what ldmatrix and cp.async move
constexpr int kUnits = kChunkBytes / kUnitBytes;

// Shared memory holds ordered keys with NaN one below kNanKey, which leaves kNanKey itself to
// places where there is no candidate: they stay behind even a NaN.
constexpr uint32_t kNobody = kNanKey;
constexpr uint32_t kLastKey = kNanKey - 1;

// What turns a product of raw rows into one of unit rows. Scaling after the product rather than
// before it means that a half-precision x̂ is never rounded.
struct Norm {
  float scale;   // 1 / max(|x|, 1e-12)
  float square;  // |x̂|²
};

enum class Product { half, tf32, three_tf32 };

// How a block is cut: each warp multiplies all rows by kKeyTiles times 16 keys, then selects for four rows.
template <int kWarps_, int kKeyTiles_, int kBlocksPerProcessor_>
struct Shape {
  static constexpr int kWarps = kWarps_;
  static constexpr int kKeyTiles = kKeyTiles_;
  static constexpr int kBlocksPerProcessor = kBlocksPerProcessor_;

  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = kThreads / kUnits;  // so that a thread stages one unit of the queries
  static constexpr int kRowTiles = (kRows + 15) / 16;
  static constexpr int kKeys = 16 * kWarps * kKeyTiles;
  static constexpr int kKeysPerLane = kKeys / 32;
  static constexpr int kCapacity = kKeys < kMaxNeighbours ? kKeys : kMaxNeighbours;  // of a shortlist
  static constexpr int kTileStride = kKeys + 8;  // rows start 8 banks apart: 8-byte stores do not collide

  // The tile takes the place of the stages, which are done with when it is written. The shortlists
  // follow it there, unless there are more tiles to come: then they lie behind the stages.
  static constexpr int kHeadBytes = (kRows + kKeys) * int(sizeof(Norm)) + kRows * 8;
  static constexpr int kStagesStart = (kHeadBytes + 127) / 128 * 128;
  static constexpr int kStageBytes = (kRows + kKeys) * kChunkBytes;
  static constexpr int kStagesEnd = kStagesStart + 2 * kStageBytes;
  static constexpr int kTileBytes = kRows * kTileStride * 4;
  static constexpr int kShortlistsBytes = kRows * kCapacity * 8;
  static_assert(kTileBytes % 16 == 0, "shortlists are read by 16 bytes");
  static_assert(kStagesStart + kTileBytes + kShortlistsBytes <= kStagesEnd, "the tile replaces the stages");
  static_assert(kStagesEnd + kShortlistsBytes <= 99 * 1024, "the least a processor since sm_80 has for a block");
};
using Wide = Shape<7, 2, 3>;    // 28 queries, 224 keys
using Narrow = Shape<4, 1, 6>;  // 16 queries, 64 keys

struct Problem {
  KnnCall call;  // with y set
  const Norm* query_norms;
  const Norm* key_norms;
  unsigned row_blocks;  // of a sample
  bool aligned;         // every row starts at a multiple of 16 bytes
};

__device__ __forceinline__ int lane_id() { return threadIdx.x % 32; }
__device__ __forceinline__ int warp_sum(int value) { return __reduce_add_sync(kAllLanes, value); }

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

// ---------------------------------------------------------------------------------------------
// Norms

constexpr int kNormThreads = 256;

// A warp a row: first all rows of x, then those of y if y has its own.
template <class Element>
__global__ void __launch_bounds__(kNormThreads)
norms_kernel(const Problem problem, int64_t x_rows, int64_t rows, Norm* norms) {
  constexpr int kPerUnit = kUnitBytes / sizeof(Element);
  const int64_t row = int64_t(blockIdx.x) * (kNormThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;  // the whole warp
  const int64_t channels = problem.call.channels;
  const Element* source = row < x_rows ? static_cast<const Element*>(problem.call.x) + row * channels
                                       : static_cast<const Element*>(problem.call.y) + (row - x_rows) * channels;
  float square = 0;
  if (problem.aligned) {
    for (int64_t first = lane_id() * kPerUnit; first < channels; first += 32 * kPerUnit) {
      const uint4 unit = *reinterpret_cast<const uint4*>(source + first);
      const Element* element = reinterpret_cast<const Element*>(&unit);
#pragma unroll
      for (int e = 0; e < kPerUnit; ++e) square += to_float(element[e]) * to_float(element[e]);
    }
  } else {
    for (int64_t c = lane_id(); c < channels; c += 32) square += to_float(source[c]) * to_float(source[c]);
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) square += __shfl_xor_sync(kAllLanes, square, distance);
  if (lane_id() != 0) return;

  float scale = problem.call.normalize ? 1.0f / fmaxf(sqrtf(square), 1e-12f) : 1.0f;
  // fmaxf drops a NaN, and TF32 rounding may too.
  const bool spoilt = !(square <= 3.4028235e38f);
  if (spoilt) scale = bits_float(0x7FC00000u);
  norms[row] = {scale, square * scale * scale};
}

// ---------------------------------------------------------------------------------------------
// Product

// Where unit `unit` of row `row` lies. The swizzle spreads the same unit of eight consecutive rows
// over all banks, as ldmatrix reads it.
template <class Byte>
__device__ __forceinline__ Byte* unit_address(Byte* rows, int row, int unit) {
  return rows + row * kChunkBytes + ((unit ^ (row & 7)) * kUnitBytes);
}

// Stages one unit, of which the first `left` elements are there: all or none if aligned.
template <class Element>
__device__ __forceinline__ void stage_unit(unsigned char* target, const Element* source, int left, bool aligned) {
  constexpr int kPerUnit = kUnitBytes / sizeof(Element);
  if (aligned) {
    copy_async_16(target, source, left > 0);
  } else {
    alignas(kUnitBytes) Element unit[kPerUnit];
#pragma unroll
    for (int e = 0; e < kPerUnit; ++e) unit[e] = e < left ? source[e] : Element{};
    *reinterpret_cast<uint4*>(target) = *reinterpret_cast<const uint4*>(unit);
  }
}

// Stages a chunk of the channels, a unit of one query and of every kRows-th key a thread. Channels
// past the end become zeros. Rows past the end are left as they are: multiply() reads them, but a
// row of an operand reaches no sums but its own, and those are not looked at.
template <class Element, class S>
__device__ __forceinline__ void stage_chunk(unsigned char* stage, const Element* queries, int rows, const Element* keys,
                                            int key_count, int chunk, const Problem& problem) {
  constexpr int kPerUnit = kUnitBytes / sizeof(Element);
  const int64_t channels = problem.call.channels;
  const int row = threadIdx.x / kUnits;
  const int unit = threadIdx.x % kUnits;
  const int64_t channel = (int64_t(chunk) * kUnits + unit) * kPerUnit;
  const int left = static_cast<int>(max(int64_t(0), min(int64_t(kPerUnit), channels - channel)));
  if (row < rows) {
    stage_unit(unit_address(stage, row, unit), queries + row * channels + channel, left, problem.aligned);
  }
  const Element* source = keys + row * channels + channel;
#pragma unroll
  for (int first = 0; first < S::kKeys; first += S::kRows) {
    const int key = first + row;
    if (key < key_count) {
      stage_unit(unit_address(stage + S::kRows * kChunkBytes, key, unit), source, left, problem.aligned);
    }
    source += S::kRows * channels;
  }
}

template <class S>
using Sums = float[S::kRowTiles][S::kKeyTiles][2][4];

// The first key of a warp's key tile. Tiles are dealt in turn, so a short last tile idles few warps.
template <class S>
__device__ __forceinline__ int first_key(int tile) {
  return (tile * S::kWarps + static_cast<int>(threadIdx.x) / 32) * 16;
}

// Splits an operand of floats into TF32 parts, in place; one of halves is left as it is.
template <Product kProduct>
__device__ __forceinline__ void split(uint32_t (&operand)[4], uint32_t (&low)[4]) {
  if constexpr (kProduct != Product::half) {
#pragma unroll
    for (int i = 0; i < 4; ++i) split_tf32(operand[i], operand[i], low[i]);
  }
}

// Adds one staged chunk, `steps` times 32 bytes of each row, to the sums.
template <class Element, Product kProduct, class S>
__device__ __forceinline__ void multiply(Sums<S>& sums, const unsigned char* stage, int key_count, int steps) {
  using Operand = std::conditional_t<kProduct == Product::half, Element, Tf32>;
  const unsigned char* keys = stage + S::kRows * kChunkBytes;
  const int lane = lane_id();
  // Unrolled, the three products would spill at Wide's three blocks a processor.
#pragma unroll(kProduct == Product::three_tf32 ? 1 : kUnits / 2)
  for (int step = 0; step < kUnits / 2; ++step) {
    if (step >= steps) break;
    uint32_t a[S::kRowTiles][4], a_low[S::kRowTiles][4];
#pragma unroll
    for (int r = 0; r < S::kRowTiles; ++r) {
      const int row = min(16 * r + lane % 16, S::kRows - 1);  // a row too many reads the last one again
      load_matrices(a[r], unit_address(stage, row, 2 * step + lane / 16));
      split<kProduct>(a[r], a_low[r]);
    }
#pragma unroll
    for (int t = 0; t < S::kKeyTiles; ++t) {
      if (first_key<S>(t) >= key_count) continue;
      uint32_t b[4], b_low[4];  // two for the first eight keys, two for the others
      load_matrices(b, unit_address(keys, first_key<S>(t) + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
      split<kProduct>(b, b_low);
#pragma unroll
      for (int r = 0; r < S::kRowTiles; ++r) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float(&sum)[4] = sums[r][t][half];
          if constexpr (kProduct == Product::three_tf32) {
            // Tensor cores cut sums off where float32 rounds them, so they are only to sum one step.
            // Small terms go first; low times low would be lost in rounding.
            float part[4] = {};
            multiply_add<Operand>(part, a_low[r], b + 2 * half);
            multiply_add<Operand>(part, a[r], b_low + 2 * half);
            multiply_add<Operand>(part, a[r], b + 2 * half);
#pragma unroll
            for (int i = 0; i < 4; ++i) sum[i] += part[i];
          } else {
            multiply_add<Operand>(sum, a[r], b + 2 * half);
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Ranking values

template <class Element>
__device__ __forceinline__ float bias_at(const KnnCall& call, int64_t offset) {
  if (call.bias_dtype == Dtype::f32) return static_cast<const float*>(call.bias)[offset];
  return to_float(static_cast<const Element*>(call.bias)[offset]);
}

// Writes the ordered keys of the warp's part of the tile, kNobody where there is no key.
template <class Element, class S>
__device__ __forceinline__ void write_tile(uint32_t* tile, const Sums<S>& sums, const Norm* query_norms,
                                           const Norm* key_norms, int rows, int key_count, int64_t bias_offset,
                                           const KnnCall& call) {
  const int lane = lane_id();
#pragma unroll
  for (int r = 0; r < S::kRowTiles; ++r) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = 16 * r + 8 * h + lane / 4;
      if (row >= rows) continue;
      const float query_scale = query_norms[row].scale;
#pragma unroll
      for (int t = 0; t < S::kKeyTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int column = first_key<S>(t) + 8 * half + 2 * (lane % 4);
          uint32_t ordered[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            ordered[e] = kNobody;
            if (column + e < key_count) {
              const Norm key = key_norms[column + e];
              float value = key.square - 2.0f * (sums[r][t][half][2 * h + e] * query_scale * key.scale);
              if (call.bias) {
                value += bias_at<Element>(
                    call, bias_offset + row * call.bias_stride[1] + (column + e) * call.bias_stride[2]);
              }
              ordered[e] = min(ordered_key(value), kLastKey);
            }
          }
          *reinterpret_cast<uint2*>(tile + row * S::kTileStride + column) = make_uint2(ordered[0], ordered[1]);
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Selection: everything here is done by one warp for one query

// Admits candidates whose key is smaller, and of those with this very key the indices below `index`.
struct Cut {
  uint32_t key;
  uint32_t index;

  __device__ __forceinline__ bool admits(uint32_t candidate, uint32_t candidate_index) const {
    return candidate < key || (candidate == key && candidate_index < index);
  }
};

// In no particular order, until sort() is called.
struct Shortlist {
  uint32_t* keys;
  uint32_t* indices;
};

// How many of the warp's candidates, kCount a lane, pass the test. Counted in floats: their predicated
// add runs beside the integer compare, on units that would otherwise idle.
template <int kCount, class Test>
__device__ __forceinline__ int count_candidates(Test passes) {
  float passed = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (passes(i)) passed += 1.0f;
  }
  return warp_sum(static_cast<int>(passed));
}

// The cut that admits exactly `wanted` of the warp's candidates, which include at least so many
// besides kNobody, with indices below `index_end`.
//
// Bisection, because a step is one compare and one add a candidate and there is seldom need of
// many: it ends as soon as a pivot has `wanted` keys up to it. Pivots halve the range of values,
// some 9 steps for features as they come. Halving the range of keys is a sure 32 steps whatever
// the values, but some 15 in common, as most keys belong to values near zero; so it comes second.
template <int kCount>
__device__ Cut find_cut(const uint32_t (&keys)[kCount], const uint32_t (&indices)[kCount], int wanted,
                        uint32_t index_end) {
  constexpr int kStepsByValue = 16;
  uint32_t low = kNobody, high = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    low = min(low, keys[i]);
    high = max(high, keys[i] == kNobody ? 0u : keys[i]);
  }
  low = __reduce_min_sync(kAllLanes, low);
  high = __reduce_max_sync(kAllLanes, high);
  float low_value = key_value(low), high_value = key_value(high);

  for (int step = 0; low < high; ++step) {
    const float middle = 0.5f * low_value + 0.5f * high_value;
    // Clamped, as infinities and NaN have no middle and rounding may reach an end.
    const uint32_t pivot =
        step < kStepsByValue ? min(max(ordered_key(middle), low), high - 1) : low + (high - low) / 2;
    const int count = count_candidates<kCount>([&](int i) { return keys[i] <= pivot; });
    if (count == wanted) return {pivot + 1, 0};
    if (count < wanted) {
      low = pivot + 1;
      low_value = middle;
    } else {
      high = pivot;
      high_value = middle;
    }
  }

  // Several candidates share the last key admitted: those with the lowest indices come in.
  const int room = wanted - count_candidates<kCount>([&](int i) { return keys[i] < low; });
  uint32_t first = 1, last = index_end;
  while (true) {
    const uint32_t end = first + (last - first) / 2;
    const int count = count_candidates<kCount>([&](int i) { return keys[i] == low && indices[i] < end; });
    if (count == room || first >= last) return {low, end};
    if (count < room) {
      first = end + 1;
    } else {
      last = end;
    }
  }
}

// Appends the admitted candidates to the first `size` entries of the shortlist.
template <int kCount>
__device__ void append(Shortlist list, int size, const uint32_t (&keys)[kCount], const uint32_t (&indices)[kCount],
                       Cut cut) {
  int admitted = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) admitted += cut.admits(keys[i], indices[i]);
  int end = admitted;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(kAllLanes, end, distance);
    if (lane_id() >= distance) end += before;
  }
  int place = size + end - admitted;
  __syncwarp();  // the candidates may have come from the places that are written now
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (cut.admits(keys[i], indices[i])) {
      list.keys[place] = keys[i];
      list.indices[place] = indices[i];
      ++place;
    }
  }
  __syncwarp();
}

// Loads this lane's part of the shortlist.
template <int kCount, int kTotal>
__device__ __forceinline__ void load_shortlist(Shortlist list, int size, uint32_t (&keys)[kTotal],
                                               uint32_t (&indices)[kTotal]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int place = 32 * i + lane_id();
    keys[i] = place < size ? list.keys[place] : kNobody;
    indices[i] = place < size ? list.indices[place] : 0;
  }
}

// Offers a row of the tile to its query's shortlist of `size` entries and returns the new size. Keys
// that are not below `limit` need not apply. Only where a shortlist would overflow is it cut back
// to `wanted`: a few late candidates cost next to nothing.
template <class S>
__device__ int offer(Shortlist list, int size, uint32_t& limit, const uint32_t* row, uint32_t first_index, int wanted,
                     uint32_t index_end) {
  constexpr int kListed = S::kCapacity / 32;
  constexpr int kOffered = S::kKeysPerLane;
  uint32_t keys[kOffered], indices[kOffered];
#pragma unroll
  for (int i = 0; i < kOffered; ++i) {
    const int column = lane_id() * kOffered + i;  // an odd stride for Wide: no two lanes share a bank
    keys[i] = row[column];
    indices[i] = first_index + column;
  }
  const int applicants = count_candidates<kOffered>([&](int i) { return keys[i] < limit; });
  if (applicants == 0) return size;
  if (size + applicants <= S::kCapacity) {
    append(list, size, keys, indices, {limit, 0});
    return size + applicants;
  }
  Cut cut;
  if (size == 0) {
    cut = find_cut(keys, indices, wanted, index_end);
    append(list, 0, keys, indices, cut);
  } else {
    uint32_t all_keys[kListed + kOffered], all_indices[kListed + kOffered];
    load_shortlist<kListed>(list, size, all_keys, all_indices);
#pragma unroll
    for (int i = 0; i < kOffered; ++i) {
      all_keys[kListed + i] = keys[i];
      all_indices[kListed + i] = indices[i];
    }
    cut = find_cut(all_keys, all_indices, wanted, index_end);
    append(list, 0, all_keys, all_indices, cut);
  }
  limit = cut.key;  // later keys have higher indices: with this very key they come too late
  return wanted;
}

// Cuts a shortlist back to `wanted`.
template <class S>
__device__ void trim(Shortlist list, int size, int wanted, uint32_t index_end) {
  constexpr int kListed = S::kCapacity / 32;
  uint32_t keys[kListed], indices[kListed];
  load_shortlist<kListed>(list, size, keys, indices);
  append(list, 0, keys, indices, find_cut(keys, indices, wanted, index_end));
}

// Sorts a shortlist of at most 32 kPerLane entries in place: an entry's place is the number of
// smaller ones. Counting them, in floats as above, takes two instructions a pair; a sorting network
// of so many (key, index) pairs takes more, most of them shuffles.
template <int kPerLane>
__device__ void sort(Shortlist list, int size) {
  uint32_t keys[kPerLane], indices[kPerLane];
  load_shortlist<kPerLane>(list, size, keys, indices);
  if (lane_id() < 3 && size + lane_id() < 32 * kPerLane) list.keys[size + lane_id()] = kNobody;  // read below by fours
  __syncwarp();
  float smaller[kPerLane] = {};
  for (int first = 0; first < size; first += 4) {
    const uint4 others = *reinterpret_cast<const uint4*>(list.keys + first);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (others.x < keys[i]) smaller[i] += 1.0f;
      if (others.y < keys[i]) smaller[i] += 1.0f;
      if (others.z < keys[i]) smaller[i] += 1.0f;
      if (others.w < keys[i]) smaller[i] += 1.0f;
    }
  }
  int places[kPerLane], pairs = 0;
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    places[i] = static_cast<int>(smaller[i]);
    if (32 * i + lane_id() < size) pairs += places[i];
  }
  if (warp_sum(pairs) != size * (size - 1) / 2) {  // some pair is equal: the lower index goes first
    for (int other = 0; other < size; ++other) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        places[i] += list.keys[other] == keys[i] && list.indices[other] < indices[i];
      }
    }
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kPerLane; ++i) {
    if (32 * i + lane_id() < size) {
      list.keys[places[i]] = keys[i];
      list.indices[places[i]] = indices[i];
    }
  }
  __syncwarp();
}

template <class S>
__device__ __forceinline__ void sort_by_size(Shortlist list, int size) {
  if (size <= 32) {
    sort<1>(list, size);
  } else if (size <= 64) {
    sort<2>(list, size);
  } else if (size <= 96) {
    if constexpr (S::kCapacity > 64) sort<3>(list, size);
  } else {
    if constexpr (S::kCapacity > 64) sort<4>(list, size);
  }
}

// ---------------------------------------------------------------------------------------------

template <class Element, Product kProduct, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerProcessor)
knn_kernel(const Problem problem) {
  FER_DYNAMIC_SHARED(shared);
  const KnnCall& call = problem.call;
  const int64_t sample = blockIdx.x / problem.row_blocks;
  const int64_t first_query = int64_t(blockIdx.x % problem.row_blocks) * S::kRows;
  const int rows = static_cast<int>(min(int64_t(S::kRows), call.queries - first_query));
  const int thread = static_cast<int>(threadIdx.x);
  const int warp = thread / 32;
  const int wanted = call.k * call.dilation;
  const uint32_t index_end = static_cast<uint32_t>(call.keys);
  const bool one_tile = call.keys <= S::kKeys;

  Norm* query_norms = reinterpret_cast<Norm*>(shared);
  Norm* key_norms = query_norms + S::kRows;
  int* sizes = reinterpret_cast<int*>(key_norms + S::kKeys);
  uint32_t* limits = reinterpret_cast<uint32_t*>(sizes + S::kRows);
  unsigned char* stages = shared + S::kStagesStart;
  uint32_t* tile = reinterpret_cast<uint32_t*>(stages);
  uint32_t* shortlists =
      reinterpret_cast<uint32_t*>(one_tile ? stages + S::kTileBytes : shared + S::kStagesEnd);
  const auto shortlist = [&](int row) {
    uint32_t* keys = shortlists + row * 2 * S::kCapacity;
    return Shortlist{keys, keys + S::kCapacity};
  };

  if (thread < rows) {
    query_norms[thread] = problem.query_norms[sample * call.queries + first_query + thread];
    sizes[thread] = 0;
    limits[thread] = kNobody;
  }

  const Element* queries =
      static_cast<const Element*>(call.x) + (sample * call.queries + first_query) * call.channels;
  const int64_t row_bytes = call.channels * static_cast<int64_t>(sizeof(Element));
  const int chunks = static_cast<int>(max(int64_t(1), (row_bytes + kChunkBytes - 1) / kChunkBytes));

  for (int64_t first_of_tile = 0; first_of_tile < call.keys; first_of_tile += S::kKeys) {
    const int key_count = static_cast<int>(min(int64_t(S::kKeys), call.keys - first_of_tile));
    const int64_t first_row = sample * call.keys + first_of_tile;
    const Element* keys = static_cast<const Element*>(call.y) + first_row * call.channels;
    if (thread < key_count) key_norms[thread] = problem.key_norms[first_row + thread];

    Sums<S> sums = {};
    stage_chunk<Element, S>(stages, queries, rows, keys, key_count, 0, problem);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      wait_for_copies();
      __syncthreads();  // this chunk has arrived, and nobody reads the one before it any more
      if (chunk + 1 < chunks) {
        stage_chunk<Element, S>(stages + (chunk + 1) % 2 * S::kStageBytes, queries, rows, keys, key_count, chunk + 1,
                                problem);
      }
      const int64_t left = row_bytes - int64_t(chunk) * kChunkBytes;
      multiply<Element, kProduct, S>(sums, stages + chunk % 2 * S::kStageBytes, key_count,
                                     static_cast<int>(min(int64_t(kUnits / 2), (left + 31) / 32)));
    }
    __syncthreads();  // the tile overwrites the stages
    const int64_t bias_offset = sample * call.bias_stride[0] + first_query * call.bias_stride[1] +
                                first_of_tile * call.bias_stride[2];
    write_tile<Element, S>(tile, sums, query_norms, key_norms, rows, key_count, bias_offset, call);
    __syncthreads();
    for (int row = warp; row < rows; row += S::kWarps) {
      uint32_t limit = limits[row];
      const int size = offer<S>(shortlist(row), sizes[row], limit, tile + row * S::kTileStride,
                                static_cast<uint32_t>(first_of_tile), wanted, index_end);
      __syncwarp();
      if (lane_id() == 0) {
        sizes[row] = size;
        limits[row] = limit;
      }
    }
    __syncthreads();  // the next stages overwrite the tile
  }

  for (int row = warp; row < rows; row += S::kWarps) {
    const Shortlist list = shortlist(row);
    if (sizes[row] > wanted) trim<S>(list, sizes[row], wanted, index_end);
    sort_by_size<S>(list, wanted);
    const int64_t out = (sample * call.queries + first_query + row) * call.k;
    for (int slot = lane_id(); slot < call.k; slot += 32) {
      int place = slot * call.dilation;
      if (call.ranks) place = static_cast<int>(max(int64_t(0), min(call.ranks[slot], int64_t(wanted - 1))));
      call.idx[out + slot] = list.indices[place];
      if (call.dist) static_cast<float*>(call.dist)[out + slot] = key_value(list.keys[place]) + query_norms[row].square;
    }
  }
}

template <class Element, Product kProduct, class S>
cudaError_t launch_shape(Problem problem, cudaStream_t stream) {
  const KnnCall& call = problem.call;
  const int64_t row_blocks = (call.queries + S::kRows - 1) / S::kRows;
  problem.row_blocks = static_cast<unsigned>(row_blocks);  // launch() refuses what this would cut off
  const int shared_bytes = S::kStagesEnd + (call.keys <= S::kKeys ? 0 : S::kShortlistsBytes);
  return launch(knn_kernel<Element, kProduct, S>, call.batch * row_blocks, S::kThreads, shared_bytes, stream,
                problem);
}

template <class Element, Product kProduct>
cudaError_t launch_kernels(const KnnCall& call, void* workspace, cudaStream_t stream) {
  constexpr int kRowsPerBlock = kNormThreads / 32;
  const int64_t x_rows = call.batch * call.queries;
  const int64_t rows = x_rows + (call.y ? call.batch * call.keys : 0);
  Norm* norms = static_cast<Norm*>(workspace);

  Problem problem = {};
  problem.call = call;
  problem.query_norms = norms;
  problem.key_norms = call.y ? norms + x_rows : norms;
  if (!call.y) problem.call.y = call.x;
  problem.aligned = call.channels * sizeof(Element) % kUnitBytes == 0 &&
                    reinterpret_cast<uintptr_t>(problem.call.x) % kUnitBytes == 0 &&
                    reinterpret_cast<uintptr_t>(problem.call.y) % kUnitBytes == 0;

  const cudaError_t error = launch(norms_kernel<Element>, (rows + kRowsPerBlock - 1) / kRowsPerBlock, kNormThreads, 0,
                                   stream, problem, x_rows, rows, norms);
  if (error != cudaSuccess) return error;
  return call.keys <= Narrow::kKeys ? launch_shape<Element, kProduct, Narrow>(problem, stream)
                                    : launch_shape<Element, kProduct, Wide>(problem, stream);
}

}  // namespace

size_t knn_workspace_bytes(const KnnCall& call) {
  return static_cast<size_t>(call.batch * (call.queries + (call.y ? call.keys : 0))) * sizeof(Norm);
}

cudaError_t knn(const KnnCall& call, void* workspace, cudaStream_t stream) {
  if (call.batch == 0 || call.queries == 0) return cudaSuccess;
  const int64_t wanted = int64_t(call.k) * call.dilation;
  if (call.k < 1 || call.dilation < 1 || wanted > std::min<int64_t>(kMaxNeighbours, call.keys) ||
      call.keys > INT32_MAX) {
    return cudaErrorInvalidValue;
  }
  switch (call.dtype) {
    case Dtype::bf16:
      return launch_kernels<__nv_bfloat16, Product::half>(call, workspace, stream);
    case Dtype::f16:
      return launch_kernels<__half, Product::half>(call, workspace, stream);
    case Dtype::f32:
      return call.allow_tf32 ? launch_kernels<float, Product::tf32>(call, workspace, stream)
                             : launch_kernels<float, Product::three_tf32>(call, workspace, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace fer::cuda
