// norm's tensors to the raw-pointer calls of csrc/include/fer/norm.h.
#pragma once
#include <vector>

#include "common.h"
#include "fer/norm.h"

namespace fer::bindings {

// A call, the contiguous tensors that it points into, and what is returned.
struct NormForwardCall : NormForward {
  std::vector<Tensor> inputs;
  Tensor y_tensor, mean_tensor, var_tensor;
};
struct NormBackwardCall : NormBackward {
  std::vector<Tensor> inputs;
  Tensor dx_tensor, dweight_tensor, dbias_tensor;
};

// The Python front checks with better words; this keeps direct calls of torch.ops memory-safe.
template <class Call>
void fill_norm(Call& call, const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
               double eps, bool gelu) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) >= 1, "norm: x must be (rows, C) with a row");
  call.rows = x.size(0), call.channels = x.size(1);
  call.dtype = to_dtype(x.scalar_type());
  call.eps = eps, call.gelu = gelu;
  call.x = contiguous_input(call, x);
  const ScalarType wide = accumulation_type(call.dtype);
  const auto of_channels = [&](const Tensor& t) {
    STD_TORCH_CHECK(is_shape(t, {x.size(1)}) && t.scalar_type() == wide && t.device() == x.device(),
                    "norm: weight, bias, mean and var must be (C,) on x's device, float64 for float64, else float32");
    return contiguous_input(call, t);
  };
  call.weight = weight ? of_channels(*weight) : nullptr;
  call.bias = bias ? of_channels(*bias) : nullptr;
}

inline NormForwardCall norm_forward(const Tensor& x, const std::optional<Tensor>& weight,
                                    const std::optional<Tensor>& bias, double eps, bool gelu) {
  NormForwardCall call{};
  fill_norm(call, x, weight, bias, eps, gelu);
  const ScalarType wide = accumulation_type(call.dtype);
  call.y_tensor = torch::stable::new_empty(x, {call.rows, call.channels});
  call.mean_tensor = torch::stable::new_empty(x, {call.channels}, wide);
  call.var_tensor = torch::stable::new_empty(x, {call.channels}, wide);
  call.y = call.y_tensor.mutable_data_ptr();
  call.mean = call.mean_tensor.mutable_data_ptr();
  call.var = call.var_tensor.mutable_data_ptr();
  return call;
}

inline NormBackwardCall norm_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight,
                                      const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& var,
                                      double eps, bool gelu) {
  NormBackwardCall call{};
  fill_norm(call, x, weight, bias, eps, gelu);
  STD_TORCH_CHECK(is_like(grad, x, {call.rows, call.channels}), "norm: the gradient must be as x");
  const ScalarType wide = accumulation_type(call.dtype);
  for (const Tensor* t : {&mean, &var})
    STD_TORCH_CHECK(is_shape(*t, {call.channels}) && t->scalar_type() == wide && t->device() == x.device(),
                    "norm: mean and var must be (C,) on x's device, float64 for float64, else float32");
  call.grad = contiguous_input(call, grad);
  call.mean = contiguous_input(call, mean);
  call.var = contiguous_input(call, var);
  call.dx_tensor = torch::stable::new_empty(x, {call.rows, call.channels});
  call.dweight_tensor = torch::stable::new_empty(x, {call.channels}, wide);
  call.dbias_tensor = torch::stable::new_empty(x, {call.channels}, wide);
  call.dx = call.dx_tensor.mutable_data_ptr();
  call.dweight = call.dweight_tensor.mutable_data_ptr();
  call.dbias = call.dbias_tensor.mutable_data_ptr();
  return call;
}

}  // namespace fer::bindings
