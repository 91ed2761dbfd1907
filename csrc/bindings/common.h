// Shared by the two bindings: torch's tensors in the terms of csrc/include/fer.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <tuple>

#include "fer/dtype.h"

namespace fer::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype to_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, "fer_kernels: expected a floating tensor"); return Dtype::f32;
  }
}

inline ScalarType accumulation_type(Dtype dtype) { return dtype == Dtype::f64 ? ScalarType::Double : ScalarType::Float; }

inline bool is_shape(const Tensor& t, std::initializer_list<int64_t> shape) {
  if (t.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t i = 0;
  for (const int64_t size : shape)
    if (t.size(i++) != size) return false;
  return true;
}

inline bool is_like(const Tensor& t, const Tensor& like, std::initializer_list<int64_t> shape) {
  return is_shape(t, shape) && t.scalar_type() == like.scalar_type() && t.device() == like.device();
}

// A pointer to the tensor's elements, contiguous, which call.inputs keeps alive.
template <class Call>
const void* contiguous_input(Call& call, const Tensor& tensor) {
  call.inputs.push_back(torch::stable::contiguous(tensor));
  return call.inputs.back().const_data_ptr();
}

}  // namespace fer::bindings
