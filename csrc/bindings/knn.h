// knn's tensors to the raw-pointer call of csrc/include/fer/knn.h, for both bindings.
#pragma once
#include "common.h"
#include "fer/knn.h"

namespace fer::bindings {

// The tensors a KnnCall points into: keeps contiguous copies alive for the length of the call.
struct KnnTensors {
  Tensor x;
  std::optional<Tensor> y, bias, ranks;
  Tensor idx, dist;
};

// The Python front checks with better words; this keeps direct calls of torch.ops memory-safe.
inline std::tuple<KnnTensors, KnnCall> knn_call(
    const Tensor& x, const std::optional<Tensor>& y, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& ranks, int64_t k, int64_t dilation, bool normalize, bool return_distance,
    bool allow_tf32) {
  STD_TORCH_CHECK(x.dim() == 3, "knn: x must be (B, N, C)");
  const int64_t batch = x.size(0), queries = x.size(1), channels = x.size(2);
  STD_TORCH_CHECK(
      !y || (y->dim() == 3 && y->size(0) == batch && y->size(2) == channels && y->scalar_type() == x.scalar_type() &&
             y->device() == x.device()),
      "knn: y must be (B, M, C) of x's dtype and device");
  const int64_t keys = y ? y->size(1) : queries;
  STD_TORCH_CHECK(keys <= INT32_MAX, "knn: at most ", INT32_MAX, " keys");
  STD_TORCH_CHECK(k >= 1 && dilation >= 1 && k <= kMaxNeighbours && dilation <= kMaxNeighbours &&
                      k * dilation <= kMaxNeighbours,
                  "knn: k * dilation must lie between 1 and ", kMaxNeighbours, ", got k=", k, ", dilation=", dilation);
  STD_TORCH_CHECK(queries == 0 || k * dilation <= keys, "knn: k * dilation = ", k * dilation, " exceeds the ", keys,
                  " keys");

  KnnTensors t;
  t.x = torch::stable::contiguous(x);
  if (y) t.y = torch::stable::contiguous(*y);
  KnnCall call{};
  call.batch = batch, call.queries = queries, call.keys = keys, call.channels = channels;
  call.k = static_cast<int>(k), call.dilation = static_cast<int>(dilation);
  call.dtype = to_dtype(x.scalar_type());
  call.normalize = normalize, call.allow_tf32 = allow_tf32;
  call.x = t.x.const_data_ptr();
  call.y = t.y ? t.y->const_data_ptr() : nullptr;
  if (bias) {
    const int64_t full[3] = {batch, queries, keys};
    STD_TORCH_CHECK(bias->dim() == 3 && bias->device() == x.device() &&
                        (bias->scalar_type() == ScalarType::Float || bias->scalar_type() == x.scalar_type()),
                    "knn: bias must be 3-D, on x's device, float32 or of x's dtype");
    for (int i = 0; i < 3; ++i) {
      STD_TORCH_CHECK(bias->size(i) == 1 || bias->size(i) == full[i], "knn: bias must broadcast to (B, N, M)");
      call.bias_stride[i] = bias->size(i) == 1 ? 0 : bias->stride(i);
    }
    call.bias = bias->const_data_ptr();
    call.bias_dtype = to_dtype(bias->scalar_type());
  }
  if (ranks) {
    STD_TORCH_CHECK(ranks->dim() == 1 && ranks->size(0) == k &&
                        (ranks->scalar_type() == ScalarType::Int || ranks->scalar_type() == ScalarType::Long),
                    "knn: ranks must be an int32 or int64 (k,)");
    t.ranks = torch::stable::contiguous(torch::stable::to(*ranks, ScalarType::Long, std::nullopt, x.device()));
    call.ranks = static_cast<const int64_t*>(t.ranks->const_data_ptr());
  }
  t.idx = torch::stable::new_empty(x, {batch, queries, k}, ScalarType::Long);
  t.dist = torch::stable::new_empty(x, {batch, queries, return_distance ? k : 0},
                                    call.dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float);
  call.idx = static_cast<int64_t*>(t.idx.mutable_data_ptr());
  call.dist = return_distance ? t.dist.mutable_data_ptr() : nullptr;
  return {t, call};
}

}  // namespace fer::bindings
