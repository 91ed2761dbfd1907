// The CPU module: operators for torch's CPU dispatch key, and facts about the build for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "bindings/conv.h"
#include "bindings/jad.h"
#include "bindings/knn.h"
#include "bindings/linear.h"
#include "bindings/norm.h"
#include "bindings/relation.h"
#include "cpu/kernels.h"

namespace {

using fer::bindings::ScalarType;
using fer::bindings::Tensor;

enum class Isa : int { baseline, avx2, avx512, amx };

std::vector<std::string> supported_isas() {
  std::vector<std::string> names = {"baseline"};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    names.push_back("avx2");
  if (names.size() == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    names.push_back("avx512");
#if defined(FER_TILES)
  if (names.size() == 3 && fer::cpu::tiles::available()) names.push_back("amx");
#endif
#endif
  return names;
}

bool made_by_intel() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

// supported_isas() grows in the order of Isa, so a name's position is its value.
std::atomic<Isa> current_isa{static_cast<Isa>(supported_isas().size() - 1)};

void set_isa(const std::string& name) {
  const auto names = supported_isas();
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) throw pybind11::value_error("this processor has no instruction set '" + name + "'");
  current_isa = static_cast<Isa>(found - names.begin());
}

template <class Kernel>
Kernel pick(Kernel baseline, Kernel avx2, Kernel avx512) {
  switch (current_isa.load()) {
    case Isa::amx:
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    default: return baseline;
  }
}

#if defined(__x86_64__)
#define FER_PICK(kernel) \
  pick(&fer::cpu::baseline::kernel, &fer::cpu::avx2::kernel, &fer::cpu::avx512::kernel)
#else
#define FER_PICK(kernel) (&fer::cpu::baseline::kernel)
#endif

std::tuple<Tensor, Tensor> knn(const Tensor& x, std::optional<Tensor> y, std::optional<Tensor> bias,
                               std::optional<Tensor> ranks, int64_t k, int64_t dilation, bool normalize,
                               bool return_distance, bool allow_tf32) {
  auto [tensors, call] =
      fer::bindings::knn_call(x, y, bias, ranks, k, dilation, normalize, return_distance, allow_tf32);
  if (call.ranks) {
    bool seen[fer::kMaxNeighbours] = {};
    for (int s = 0; s < call.k; ++s) {
      const int64_t rank = call.ranks[s];
      STD_TORCH_CHECK(rank >= 0 && rank < k * dilation, "knn: ranks must lie in [0, ", k * dilation, "), got ", rank);
      STD_TORCH_CHECK(!seen[rank], "knn: ranks must not repeat, got ", rank, " twice");
      seen[rank] = true;
    }
  }
  const auto kernel = FER_PICK(knn);
  // A thread is worth waking for about a tenth of a millisecond of products.
  const int64_t grain = std::max<int64_t>(1, 4'000'000 / std::max<int64_t>(1, call.keys * (call.channels + 16)));
  const fer::KnnCall& shared = call;
  torch::stable::parallel_for(0, call.batch * call.queries, grain,
                              [&shared, kernel](int64_t begin, int64_t end) { kernel(shared, begin, end); });
  return {tensors.idx, tensors.dist};
}

// Kernels trust the indices, so every call looks at all of them first.
void check_indices(const int64_t* idx, int64_t count, int64_t keys) {
  const auto bounds = FER_PICK(index_bounds);
  std::mutex mutex;
  int64_t low = INT64_MAX, high = INT64_MIN;
  torch::stable::parallel_for(0, count, 1 << 16, [&](int64_t begin, int64_t end) {
    int64_t least, most;
    bounds(idx + begin, end - begin, &least, &most);
    const std::lock_guard<std::mutex> lock(mutex);
    low = std::min(low, least), high = std::max(high, most);
  });
  if (count != 0 && (low < 0 || high >= keys)) {  // not by STD_TORCH_CHECK, which names this file: a user's mistake
    throw std::runtime_error("relation_aggregate: idx must lie in [0, M) with M = " + std::to_string(keys) +
                             ", but idx holds values from " + std::to_string(low) + " to " + std::to_string(high));
  }
}

// Units worth waking a thread for: about a tenth of a millisecond.
int64_t relation_grain(const fer::RelationCall& call, int64_t units) {
  const int64_t edges = call.batch * call.queries * call.k;
  const int64_t work = edges * (call.channels + call.heads * (call.width + 16));
  return std::max<int64_t>(1, 500'000 / std::max<int64_t>(1, work / std::max<int64_t>(1, units)));
}

std::tuple<Tensor, Tensor, Tensor> relation(const Tensor& x, const Tensor& idx, std::optional<Tensor> y,
                                            std::optional<Tensor> p, std::optional<Tensor> q, std::optional<Tensor> a,
                                            std::optional<Tensor> reverse, int64_t mode, double negative_slope,
                                            bool return_weights, bool save_slots) {
  const auto call = fer::bindings::relation_forward(x, idx, y, p, q, a, mode, negative_slope, return_weights, save_slots);
  check_indices(call.idx, call.batch * call.queries * call.k, call.keys);
  const auto kernel = FER_PICK(relation);
  const int64_t units = FER_PICK(relation_units)(call);
  torch::stable::parallel_for(0, units, relation_grain(call, units),
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
  return {call.out_tensor, call.weights_tensor, call.slots_tensor};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> relation_backward(
    const Tensor& grad, std::optional<Tensor> grad_weights, std::optional<Tensor> x, const Tensor& idx,
    std::optional<Tensor> y, std::optional<Tensor> p, std::optional<Tensor> q, std::optional<Tensor> a,
    std::optional<Tensor> slots, std::optional<Tensor> reverse, int64_t keys, bool own_keys, int64_t mode,
    double negative_slope, bool need_nodes, bool need_relation) {
  const auto call = fer::bindings::relation_backward(grad, grad_weights, x, idx, y, p, q, a, slots, keys, own_keys, mode,
                                                     negative_slope, need_nodes, need_relation);
  check_indices(call.idx, call.batch * call.queries * call.k, call.keys);
  const auto kernel = FER_PICK(relation_backward);
  const int64_t units = FER_PICK(relation_backward_units)(call);
  std::vector<double> da_parts(need_relation ? units * call.width : 0);
  torch::stable::parallel_for(0, units, relation_grain(call, units), [&](int64_t begin, int64_t end) {
    kernel(call, da_parts.data(), begin, end);
  });
  if (need_relation) FER_PICK(relation_sum_parts)(call, da_parts.data());
  return {call.dx_tensor, call.dy_tensor, call.dp_tensor, call.dq_tensor, call.da_tensor};
}

// A counting sort by key: edges of one key keep their order.
Tensor relation_reverse(const Tensor& idx, int64_t keys) {
  STD_TORCH_CHECK(idx.dim() == 3 && idx.scalar_type() == ScalarType::Long && keys >= 0,
                  "relation: idx must be an int64 (B, N, k)");
  const Tensor from = torch::stable::contiguous(idx);
  const int64_t batch = idx.size(0), edges = idx.size(1) * idx.size(2);
  STD_TORCH_CHECK(keys <= INT32_MAX && edges <= INT32_MAX, "relation: too many keys or edges");
  const int64_t* data = static_cast<const int64_t*>(from.const_data_ptr());
  check_indices(data, batch * edges, keys);
  const Tensor reverse = torch::stable::new_empty(idx, {batch, keys + 1 + edges}, ScalarType::Int);
  int32_t* out = static_cast<int32_t*>(reverse.mutable_data_ptr());
  torch::stable::parallel_for(0, batch, std::max<int64_t>(1, 30'000 / std::max<int64_t>(1, edges)), [&](int64_t begin, int64_t end) {
    std::vector<int32_t> next(keys);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t* key = data + b * edges;
      int32_t* offsets = out + b * (keys + 1 + edges);
      std::fill_n(offsets, keys + 1, 0);
      for (int64_t e = 0; e < edges; ++e) ++offsets[key[e] + 1];
      std::partial_sum(offsets, offsets + keys + 1, offsets);
      std::copy_n(offsets, keys, next.begin());
      for (int64_t e = 0; e < edges; ++e) offsets[keys + 1 + next[key[e]]++] = static_cast<int32_t>(e);
    }
  });
  return reverse;
}

// Heads, or parts of them, worth waking a thread for.
int64_t jad_grain(const fer::JadCall& call, int64_t units) {
  const int64_t work = call.batch * call.heads * call.queries * call.keys * (call.width + 16);
  return std::max<int64_t>(1, 2'000'000 / std::max<int64_t>(1, work / std::max<int64_t>(1, units)));
}

void run_jad(const fer::bindings::JadForwardCall& call, const Tensor& like) {
  const int64_t heads = call.batch * call.heads;
  const bool look = FER_PICK(jad_wants_means)(call);
  // Where the means are no output they are scratch.
  const Tensor scratch = torch::stable::new_empty(like, {look && !call.column_mean ? heads * call.keys : 0},
                                                  fer::bindings::accumulation_type(call.dtype));
  void* means = call.column_mean ? call.column_mean : scratch.mutable_data_ptr();
  if (FER_PICK(jad_keeps_powers)(call)) {
    const auto kernel = FER_PICK(jad_heads);
    torch::stable::parallel_for(0, heads, jad_grain(call, heads),
                                [&](int64_t begin, int64_t end) { kernel(call, means, begin, end); });
    return;
  }
  const int64_t units = heads * FER_PICK(jad_chunks)(call), grain = jad_grain(call, units);
  std::vector<double> parts(look ? units * call.keys : 0);
  if (look) {
    const auto kernel = FER_PICK(jad_means);
    torch::stable::parallel_for(0, units, grain,
                                [&](int64_t begin, int64_t end) { kernel(call, parts.data(), begin, end); });
  }
  FER_PICK(jad_choose)(call, look ? parts.data() : nullptr, means);
  if (!call.out) return;
  const auto kernel = FER_PICK(jad_outputs);
  torch::stable::parallel_for(0, units, grain,
                              [&](int64_t begin, int64_t end) { kernel(call, means, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> jad(const Tensor& q, const Tensor& k, const Tensor& v,
                                                       std::optional<Tensor> gate, std::optional<Tensor> noise,
                                                       int64_t mode, double beta, double max_drop, int64_t protect,
                                                       double soft, double tau, bool joint_over_head, double scale,
                                                       bool return_stats, bool save) {
  const auto call = fer::bindings::jad_forward(q, k, v, gate, noise, mode, beta, max_drop, protect, soft, tau,
                                               joint_over_head, scale, return_stats, save);
  run_jad(call, q);
  return {call.out_tensor, call.lse_tensor, call.column_mean_tensor, call.bias_tensor, call.bits_tensor};
}

std::tuple<Tensor, Tensor> jad_column_mean(const Tensor& q, const Tensor& k, double scale) {
  const auto call = fer::bindings::jad_column_mean(q, k, scale);
  run_jad(call, q);
  return {call.column_mean_tensor, call.lse_tensor};
}

void run_jad_backward(const fer::bindings::JadBackwardCall& call) {
  const int64_t heads = call.batch * call.heads;
  const auto kernel = FER_PICK(jad_backward);
  torch::stable::parallel_for(0, heads, jad_grain(call, heads),
                              [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> jad_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                                const Tensor& out, const Tensor& lse, const Tensor& bias,
                                                const Tensor& bits, double scale) {
  const auto call = fer::bindings::jad_backward(grad, q, k, v, lse, bias, bits, scale);
  run_jad_backward(call);
  return {call.dq_tensor, call.dk_tensor, call.dv_tensor};
}

std::tuple<Tensor, Tensor> jad_column_mean_backward(const Tensor& grad, const Tensor& q, const Tensor& k,
                                                    const Tensor& lse, double scale) {
  const auto call = fer::bindings::jad_column_mean_backward(grad, q, k, lse, scale);
  run_jad_backward(call);
  return {call.dq_tensor, call.dk_tensor};
}

// All chunks of a pass over a norm's rows.
template <class Call, class Pass>
void over_chunks(const Call& call, Pass pass) {
  const int64_t grain = std::max<int64_t>(1, 50'000 / (fer::kNormRows * std::max<int64_t>(1, call.channels)));
  torch::stable::parallel_for(0, call.chunks(), grain, pass);
}

// The parts of all chunks, and what they make together.
template <class Call>
void sum_chunks(const Call& call, void (*sum)(const Call&, double*, int64_t, int64_t), void (*merge)(const Call&, const double*)) {
  std::vector<double> parts(call.chunks() * 2 * call.channels);
  over_chunks(call, [&](int64_t begin, int64_t end) { sum(call, parts.data(), begin, end); });
  merge(call, parts.data());
}

std::tuple<Tensor, Tensor, Tensor> norm(const Tensor& x, std::optional<Tensor> weight, std::optional<Tensor> bias,
                                        std::optional<Tensor> residual, std::optional<Tensor> gain, double eps,
                                        int64_t act) {
  const auto call = fer::bindings::norm_forward(x, weight, bias, residual, gain, eps, act);
  sum_chunks<fer::NormForward>(call, FER_PICK(norm_stats), FER_PICK(norm_merge));
  const auto apply = FER_PICK(norm_apply);
  over_chunks(call, [&](int64_t begin, int64_t end) { apply(call, begin, end); });
  return {call.y_tensor, call.mean_tensor, call.var_tensor};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_backward(const Tensor& grad, const Tensor& x,
                                                         std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                         std::optional<Tensor> residual, std::optional<Tensor> gain,
                                                         const Tensor& mean, const Tensor& var, double eps,
                                                         int64_t act) {
  const auto call = fer::bindings::norm_backward(grad, x, weight, bias, residual, gain, mean, var, eps, act, false);
  sum_chunks<fer::NormBackward>(call, FER_PICK(norm_backward_sums), FER_PICK(norm_backward_merge));
  const auto apply = FER_PICK(norm_backward_apply);
  over_chunks(call, [&](int64_t begin, int64_t end) { apply(call, begin, end); });
  return {call.dx_tensor, call.dweight_tensor, call.dbias_tensor, call.dresidual_tensor};
}

Tensor norm_given(const Tensor& x, const Tensor& mean, const Tensor& var, std::optional<Tensor> weight,
                  std::optional<Tensor> bias, std::optional<Tensor> residual, std::optional<Tensor> gain, double eps,
                  int64_t act) {
  const auto call = fer::bindings::norm_given_forward(x, mean, var, weight, bias, residual, gain, eps, act);
  const auto apply = FER_PICK(norm_apply);
  over_chunks(call, [&](int64_t begin, int64_t end) { apply(call, begin, end); });
  return call.y_tensor;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> norm_given_backward(
    const Tensor& grad, const Tensor& x, const Tensor& mean, const Tensor& var, std::optional<Tensor> weight,
    std::optional<Tensor> bias, std::optional<Tensor> residual, std::optional<Tensor> gain, double eps, int64_t act) {
  const auto call = fer::bindings::norm_backward(grad, x, weight, bias, residual, gain, mean, var, eps, act, true);
  sum_chunks<fer::NormBackward>(call, FER_PICK(norm_backward_sums), FER_PICK(norm_backward_merge));
  return {call.dx_tensor, call.dmean_tensor, call.dvar_tensor, call.dweight_tensor, call.dbias_tensor, call.dresidual_tensor};
}

#if defined(FER_TILES)
#define FER_PICK_LINEAR(kernel) (current_isa.load() == Isa::amx ? &fer::cpu::tiles::kernel : FER_PICK(kernel))
#else
#define FER_PICK_LINEAR FER_PICK
#endif

bool multiplies_bfloat16() {
#if defined(__x86_64__)
  const auto isas = supported_isas();
  return std::find(isas.begin(), isas.end(), "avx512") != isas.end() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

#if defined(__x86_64__)
#define FER_PICK_NORMED(kernel) (bfloat16 ? &fer::cpu::avx512bf16::kernel : FER_PICK(kernel))
#else
#define FER_PICK_NORMED(kernel) (static_cast<void>(bfloat16), FER_PICK(kernel))
#endif

// Whether x is bfloat16, for which there is a kernel on some processors, if at all.
bool check_dtype(const Tensor& x, bool normed) {
  static const bool here = multiplies_bfloat16();
  const bool bfloat16 = x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float || (bfloat16 && normed && here),
                  "linear: there is no kernel for x's dtype here");
  return bfloat16;
}

// Products worth waking a thread for: about a tenth of a millisecond.
int64_t linear_grain(int64_t units, int64_t work) {
  return std::max<int64_t>(1, 20'000'000 / std::max<int64_t>(1, work / std::max<int64_t>(1, units)));
}

// linear's functions, of one instruction set.
template <class Call>
struct LinearRows {
  int64_t chunk;
  int64_t (*units)(const fer::LinearCall&, bool);
  int64_t (*packed)(const fer::LinearCall&, bool);
  void (*pack)(const fer::LinearCall&, bool, void*, int64_t, int64_t);
  void (*product)(const Call&, const void*, int64_t, int64_t);
};
#define FER_LINEAR_ROWS(pick, product) \
  {pick(linear_chunk)(), pick(linear_units), pick(linear_packed), pick(linear_pack), pick(product)}
struct LinearWeight {
  int64_t (*parts)(const fer::LinearCall&);
  int64_t (*size)(const fer::LinearCall&);
  int64_t (*units)(const fer::LinearCall&);
  void (*sum)(const fer::LinearBackward&, float*, int64_t, int64_t);
  void (*merge)(const fer::LinearBackward&, const float*, int64_t, int64_t);
};
#define FER_LINEAR_WEIGHT(pick) \
  {pick(linear_parts), pick(linear_part_size), pick(linear_part_units), pick(linear_weight_parts), pick(linear_weight_merge)}

int64_t linear_work(const fer::LinearCall& call) { return call.rows * call.groups * call.in * call.out * call.sides; }

template <class Call>
void run_rows(const Call& call, const Tensor& like, bool transposed, const LinearRows<Call>& by) {
  const Tensor packed = torch::stable::new_empty(like, {by.packed(call, transposed)}, ScalarType::Byte);
  void* data = packed.mutable_data_ptr();
  const int64_t packs = by.units(call, transposed), weights = call.groups * call.in * call.out * call.sides;
  torch::stable::parallel_for(0, packs, std::max<int64_t>(1, 50'000 * packs / std::max<int64_t>(1, weights)),
                              [&](int64_t begin, int64_t end) { by.pack(call, transposed, data, begin, end); });
  const int64_t units = (call.rows + by.chunk - 1) / by.chunk;
  torch::stable::parallel_for(0, units, linear_grain(units, linear_work(call)), [&](int64_t begin, int64_t end) {
    by.product(call, data, begin * by.chunk, std::min(call.rows, end * by.chunk));
  });
}

void run_weight(const fer::LinearBackward& call, const Tensor& like, const LinearWeight& by) {
  const int64_t parts = by.parts(call), units = parts * by.units(call);
  const Tensor sums = torch::stable::new_empty(like, {parts * by.size(call)}, ScalarType::Float);
  float* data = static_cast<float*>(sums.mutable_data_ptr());
  torch::stable::parallel_for(0, units, linear_grain(units, linear_work(call)),
                              [&](int64_t begin, int64_t end) { by.sum(call, data, begin, end); });
  torch::stable::parallel_for(0, call.groups * call.out, std::max<int64_t>(1, 30'000 / call.in),
                              [&](int64_t begin, int64_t end) { by.merge(call, data, begin, end); });
}

Tensor linear(const Tensor& x, std::optional<Tensor> m, const Tensor& weight, std::optional<Tensor> bias,
              int64_t groups) {
  check_dtype(x, false);
  const auto call = fer::bindings::linear_forward(x, m, weight, bias, groups);
  run_rows<fer::LinearForward>(call, x, false, FER_LINEAR_ROWS(FER_PICK_LINEAR, linear));
  return call.y_tensor;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& grad, const Tensor& x, std::optional<Tensor> m,
                                                   const Tensor& weight, int64_t groups, bool need_nodes,
                                                   bool need_weight) {
  check_dtype(x, false);
  const auto call = fer::bindings::linear_backward(grad, x, m, weight, groups, need_nodes, need_weight);
  if (need_nodes) run_rows<fer::LinearBackward>(call, x, true, FER_LINEAR_ROWS(FER_PICK_LINEAR, linear_input_gradient));
  if (need_weight) run_weight(call, x, FER_LINEAR_WEIGHT(FER_PICK_LINEAR));
  return {call.dx_tensor, call.dm_tensor, call.dweight_tensor};
}

std::tuple<Tensor, Tensor, Tensor> linear_normed(const Tensor& x, std::optional<Tensor> m, const Tensor& weight,
                                                 std::optional<Tensor> mean, std::optional<Tensor> var,
                                                 std::optional<Tensor> scale, std::optional<Tensor> shift, int64_t groups,
                                                 double eps, int64_t act) {
  const bool bfloat16 = check_dtype(x, true);
  const auto call = fer::bindings::linear_normed_forward(x, m, weight, mean, var, scale, shift, groups, eps, act,
                                                         FER_PICK_NORMED(linear_chunk)());
  run_rows<fer::LinearForward>(call, x, false, FER_LINEAR_ROWS(FER_PICK_NORMED, linear));
  FER_PICK_NORMED(linear_merge_stats)(call);
  return {call.y_tensor, call.mean_tensor, call.var_tensor};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_normed_backward(
    const Tensor& grad, const Tensor& dy_mean, const Tensor& dy_var, const Tensor& x, std::optional<Tensor> m,
    const Tensor& weight, std::optional<Tensor> mean, std::optional<Tensor> var, std::optional<Tensor> scale,
    std::optional<Tensor> shift, const Tensor& y, const Tensor& y_mean, int64_t groups, double eps, int64_t act,
    bool need_nodes, bool need_weight) {
  const bool bfloat16 = check_dtype(x, true);
  const auto call = fer::bindings::linear_normed_backward(grad, dy_mean, dy_var, x, m, weight, mean, var, scale, shift, y,
                                                          y_mean, groups, eps, act, need_nodes, need_weight,
                                                          FER_PICK_NORMED(linear_chunk)());
  if (need_nodes) {
    run_rows<fer::LinearBackward>(call, x, true, FER_LINEAR_ROWS(FER_PICK_NORMED, linear_input_gradient));
    const int64_t chunk = FER_PICK_NORMED(linear_chunk)();
    if (mean) FER_PICK_NORMED(linear_merge_gradients)(call, (call.rows + chunk - 1) / chunk);
  }
  if (need_weight) run_weight(call, x, FER_LINEAR_WEIGHT(FER_PICK_NORMED));
  const auto& d = call.dnorm;
  return {call.dx_tensor, call.dm_tensor, call.dweight_tensor, d[0], d[1], d[2], d[3]};
}

std::tuple<Tensor, Tensor, Tensor> conv(const Tensor& x, const Tensor& weight, std::optional<Tensor> mean,
                                        std::optional<Tensor> var, std::optional<Tensor> scale, std::optional<Tensor> shift,
                                        int64_t stride, int64_t padding, double eps, int64_t act) {
  const bool bfloat16 = check_dtype(x, true);
  const auto call = fer::bindings::conv_forward(x, weight, mean, var, scale, shift, stride, padding, eps, act,
                                                FER_PICK_NORMED(linear_chunk)());
  run_rows<fer::LinearForward>(call, x, false, FER_LINEAR_ROWS(FER_PICK_NORMED, linear));
  FER_PICK_NORMED(linear_merge_stats)(call);
  return {call.y_tensor, call.mean_tensor, call.var_tensor};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_backward(
    const Tensor& grad, const Tensor& dy_mean, const Tensor& dy_var, const Tensor& x, const Tensor& weight,
    std::optional<Tensor> mean, std::optional<Tensor> var, std::optional<Tensor> scale, std::optional<Tensor> shift,
    const Tensor& y, const Tensor& y_mean, int64_t stride, int64_t padding, double eps, int64_t act, bool need_map,
    bool need_weight) {
  const bool bfloat16 = check_dtype(x, true);
  const auto call = fer::bindings::conv_backward(grad, dy_mean, dy_var, x, weight, mean, var, scale, shift, y, y_mean, stride,
                                                 padding, eps, act, need_map, need_weight, FER_PICK_NORMED(linear_chunk)());
  for (const auto& kind : call.kinds)
    run_rows<fer::LinearBackward>(kind, x, true, FER_LINEAR_ROWS(FER_PICK_NORMED, linear_input_gradient));
  if (need_map && mean) {
    fer::LinearBackward of_norm = call;
    of_norm.in = call.kinds[0].in;
    FER_PICK_NORMED(linear_merge_gradients)(of_norm, call.chunks);
  }
  if (need_weight) run_weight(call, x, FER_LINEAR_WEIGHT(FER_PICK_NORMED));
  const auto& d = call.dnorm;
  return {call.dx_tensor, call.dweight_tensor, d[0], d[1], d[2], d[3]};
}

STABLE_TORCH_LIBRARY_IMPL(fer_kernels, CPU, m) {
  m.impl("knn", TORCH_BOX(&knn));
  m.impl("relation", TORCH_BOX(&relation));
  m.impl("relation_backward", TORCH_BOX(&relation_backward));
  m.impl("relation_reverse", TORCH_BOX(&relation_reverse));
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
  m.impl("norm_given", TORCH_BOX(&norm_given));
  m.impl("norm_given_backward", TORCH_BOX(&norm_given_backward));
  m.impl("jad", TORCH_BOX(&jad));
  m.impl("jad_backward", TORCH_BOX(&jad_backward));
  m.impl("jad_column_mean", TORCH_BOX(&jad_column_mean));
  m.impl("jad_column_mean_backward", TORCH_BOX(&jad_column_mean_backward));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_backward", TORCH_BOX(&linear_backward));
  m.impl("linear_normed", TORCH_BOX(&linear_normed));
  m.impl("linear_normed_backward", TORCH_BOX(&linear_normed_backward));
  m.impl("conv", TORCH_BOX(&conv));
  m.impl("conv_backward", TORCH_BOX(&conv_backward));
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Compiled CPU operators of fer_kernels, and what they run on.";
  m.def("supported_isas", &supported_isas, "Instruction sets of this processor that kernels exist for, slowest first.");
  m.def("current_isa", [] { return supported_isas()[static_cast<int>(current_isa.load())]; });
  m.def("set_isa", &set_isa, pybind11::arg("name"));
  m.def("made_by_intel", &made_by_intel);
  m.def("multiplies_bfloat16", &multiplies_bfloat16, "Whether this processor has the vectors that normed_linear takes for bfloat16.");
  m.def("num_threads", [] { return torch::stable::get_num_threads(); });
}
