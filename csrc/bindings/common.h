// Shared by the two bindings: torch's tensors in the terms of csrc/include/fer.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
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

}  // namespace fer::bindings
