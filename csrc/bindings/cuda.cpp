// The CUDA module: operators for torch's CUDA dispatch key, and facts about the build for Python.
// Host code only: the compiler that builds torch extensions compiles it, nvcc does not.
#define USE_CUDA  // the stable ABI declares its CUDA functions, the current stream among them, only under this
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <string>
#include <tuple>

#include "bindings/knn.h"
#include "bindings/relation.h"
#include "cuda/kernels.h"

#ifndef FER_CUDA_ARCHS
#error "FER_CUDA_ARCHS: the architectures that the kernels are compiled for, as a string"
#endif

namespace {

using fer::bindings::ScalarType;
using fer::bindings::Tensor;

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  // Not STABLE_TORCH_ERROR_CODE_CHECK, which torch 2.11 does not have.
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                  "no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* name, cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error), " (compiled for ", FER_CUDA_ARCHS, ")");
}

// Where torch may hand it out again as soon as this host function returns: what then writes to it
// is queued on the same stream, behind the kernels.
Tensor scratch(const Tensor& like, size_t bytes) {
  return torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

std::tuple<Tensor, Tensor> knn(const Tensor& x, std::optional<Tensor> y, std::optional<Tensor> bias,
                               std::optional<Tensor> ranks, int64_t k, int64_t dilation, bool normalize,
                               bool return_distance, bool allow_tf32) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const auto [tensors, call] =
      fer::bindings::knn_call(x, y, bias, ranks, k, dilation, normalize, return_distance, allow_tf32);
  STD_TORCH_CHECK(call.dtype != fer::Dtype::f64, "knn: float64 is not supported on CUDA");
  const Tensor workspace = scratch(x, fer::cuda::knn_workspace_bytes(call));
  check_launch("knn", fer::cuda::knn(call, workspace.mutable_data_ptr(), current_stream(x)));
  return {tensors.idx, tensors.dist};
}

void check_relation_dtype(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() != ScalarType::Double, "relation: float64 is not supported on CUDA");
}

std::tuple<Tensor, Tensor, Tensor> relation(const Tensor& x, const Tensor& idx, std::optional<Tensor> y,
                                            std::optional<Tensor> p, std::optional<Tensor> q, std::optional<Tensor> a,
                                            std::optional<Tensor>, int64_t mode, double negative_slope,
                                            bool return_weights, bool save_slots) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_relation_dtype(x);
  const auto call =
      fer::bindings::relation_forward(x, idx, y, p, q, a, mode, negative_slope, return_weights, save_slots);
  check_launch("relation", fer::cuda::relation(call, current_stream(x)));
  return {call.out_tensor, call.weights_tensor, call.slots_tensor};
}

// (B, N, k) of a tensor that has been checked to be idx, contiguous.
Tensor sorted_by_key(const Tensor& idx, int64_t keys) {
  const int64_t batch = idx.size(0), queries = idx.size(1), k = idx.size(2);
  const Tensor reverse = torch::stable::new_empty(idx, {batch, keys + 1 + queries * k}, ScalarType::Int);
  check_launch("relation_reverse", fer::cuda::relation_reverse(static_cast<const int64_t*>(idx.const_data_ptr()), batch,
                                                               queries, keys, static_cast<int>(k),
                                                               static_cast<int32_t*>(reverse.mutable_data_ptr()),
                                                               current_stream(idx)));
  return reverse;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> relation_backward(
    const Tensor& grad, std::optional<Tensor> grad_weights, std::optional<Tensor> x, const Tensor& idx,
    std::optional<Tensor> y, std::optional<Tensor> p, std::optional<Tensor> q, std::optional<Tensor> a,
    std::optional<Tensor> slots, std::optional<Tensor> reverse, int64_t keys, bool own_keys, int64_t mode,
    double negative_slope, bool need_nodes, bool need_relation) {
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  check_relation_dtype(grad);
  auto call = fer::bindings::relation_backward(grad, grad_weights, x, idx, y, p, q, a, slots, keys, own_keys, mode,
                                               negative_slope, need_nodes, need_relation);
  if (fer::cuda::relation_backward_needs_reverse(call)) {
    STD_TORCH_CHECK(!reverse || (reverse->scalar_type() == ScalarType::Int && reverse->device() == grad.device() &&
                                 fer::bindings::is_shape(*reverse, {call.batch, keys + 1 + call.queries * call.k})),
                    "relation: reverse must be an int32 (B, M + 1 + N * k) on x's device");
    // As scratch() says, what was built here may be freed when this function returns.
    const Tensor given = reverse ? *reverse : sorted_by_key(torch::stable::contiguous(idx), keys);
    call.reverse = static_cast<const int32_t*>(fer::bindings::contiguous_input(call, given));
  }
  const Tensor workspace = scratch(grad, fer::cuda::relation_backward_workspace_bytes(call));
  check_launch("relation_backward",
               fer::cuda::relation_backward(call, workspace.mutable_data_ptr(), current_stream(grad)));
  return {call.dx_tensor, call.dy_tensor, call.dp_tensor, call.dq_tensor, call.da_tensor};
}

Tensor relation_reverse(const Tensor& idx, int64_t keys) {
  const torch::stable::accelerator::DeviceGuard guard(idx.get_device_index());
  STD_TORCH_CHECK(idx.dim() == 3 && idx.scalar_type() == ScalarType::Long && idx.size(2) >= 1 && idx.size(2) <= 128,
                  "relation_reverse: idx must be an int64 (B, N, k) with k from 1 to 128");
  return sorted_by_key(torch::stable::contiguous(idx), keys);
}

STABLE_TORCH_LIBRARY_IMPL(fer_kernels, CUDA, m) {
  m.impl("knn", TORCH_BOX(&knn));
  m.impl("relation", TORCH_BOX(&relation));
  m.impl("relation_backward", TORCH_BOX(&relation_backward));
  m.impl("relation_reverse", TORCH_BOX(&relation_reverse));
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION / 10 % 100);
  info["architectures"] = FER_CUDA_ARCHS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Compiled CUDA operators of fer_kernels, and what they were built for.";
  m.def("build_info", &build_info, "The CUDA version compiled with, and the architectures compiled for.");
}
