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

STABLE_TORCH_LIBRARY_IMPL(fer_kernels, CUDA, m) { m.impl("knn", TORCH_BOX(&knn)); }

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
