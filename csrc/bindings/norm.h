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
  Tensor dx_tensor, dweight_tensor, dbias_tensor, dresidual_tensor, dmean_tensor, dvar_tensor;
};

// What both directions take. The Python front checks with better words; this keeps direct calls of torch.ops
// memory-safe.
template <class Call>
void fill_norm(Call& call, const Tensor& x, const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
               const std::optional<Tensor>& residual, const std::optional<Tensor>& gain, double eps, int64_t act,
               const Tensor* like_y) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) >= 1, "norm: x must be (rows, C) with a row");
  STD_TORCH_CHECK(act >= 0 && act <= static_cast<int64_t>(NormAct::gelu), "norm: unknown act ", act);
  call.rows = x.size(0), call.channels = x.size(1);
  call.dtype = to_dtype(x.scalar_type());
  call.eps = eps, call.act = static_cast<NormAct>(act);
  call.x = contiguous_input(call, x);
  const ScalarType wide = accumulation_type(call.dtype);
  const auto numbers = [&](const Tensor& t, int64_t count) {
    STD_TORCH_CHECK(is_shape(t, {count}) && t.scalar_type() == wide && t.device() == x.device(),
                    "norm: weight, bias, mean, var (C,) and gain (S,) must be on x's device, float64 for float64, "
                    "else float32");
    return contiguous_input(call, t);
  };
  call.weight = weight ? numbers(*weight, call.channels) : nullptr;
  call.bias = bias ? numbers(*bias, call.channels) : nullptr;
  call.samples = gain ? gain->size(0) : 1;
  STD_TORCH_CHECK(call.samples >= 1 && call.rows % call.samples == 0, "norm: gain must divide the rows");
  call.gain = gain ? numbers(*gain, call.samples) : nullptr;
  for (const Tensor* t : {like_y, residual ? &*residual : nullptr})
    if (t) {
      STD_TORCH_CHECK(is_shape(*t, {call.rows, call.channels}) && t->device() == x.device() &&
                          (t->scalar_type() == x.scalar_type() || t->scalar_type() == wide),
                      "norm: residual and gradient must be as x, or float32");
      call.wide = t->scalar_type() != x.scalar_type();
    }
  STD_TORCH_CHECK(!residual || !like_y || residual->scalar_type() == like_y->scalar_type(),
                  "norm: the gradient must have the residual's dtype");
  call.residual = residual ? contiguous_input(call, *residual) : nullptr;
}

inline NormForwardCall norm_forward(const Tensor& x, const std::optional<Tensor>& weight,
                                    const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                                    const std::optional<Tensor>& gain, double eps, int64_t act) {
  NormForwardCall call{};
  fill_norm(call, x, weight, bias, residual, gain, eps, act, nullptr);
  const ScalarType wide = accumulation_type(call.dtype);
  call.y_tensor = torch::stable::new_empty(x, {call.rows, call.channels}, call.wide ? wide : x.scalar_type());
  call.mean_tensor = torch::stable::new_empty(x, {call.channels}, wide);
  call.var_tensor = torch::stable::new_empty(x, {call.channels}, wide);
  call.y = call.y_tensor.mutable_data_ptr();
  call.mean = call.mean_tensor.mutable_data_ptr();
  call.var = call.var_tensor.mutable_data_ptr();
  return call;
}

template <class Call>
void fill_statistics(Call& call, const Tensor& x, const Tensor& mean, const Tensor& var) {
  for (const Tensor* t : {&mean, &var})
    STD_TORCH_CHECK(is_shape(*t, {call.channels}) && t->scalar_type() == accumulation_type(call.dtype) && t->device() == x.device(),
                    "norm: mean and var must be (C,) on x's device, float64 for float64, else float32");
  call.mean = const_cast<void*>(contiguous_input(call, mean));  // the forward pass writes its own alone
  call.var = const_cast<void*>(contiguous_input(call, var));
}

// As norm_forward, by statistics that are given.
inline NormForwardCall norm_given_forward(const Tensor& x, const Tensor& mean, const Tensor& var,
                                          const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                          const std::optional<Tensor>& residual, const std::optional<Tensor>& gain,
                                          double eps, int64_t act) {
  NormForwardCall call{};
  fill_norm(call, x, weight, bias, residual, gain, eps, act, nullptr);
  fill_statistics(call, x, mean, var);
  call.y_tensor = torch::stable::new_empty(x, {call.rows, call.channels},
                                           call.wide ? accumulation_type(call.dtype) : x.scalar_type());
  call.y = call.y_tensor.mutable_data_ptr();
  return call;
}

inline NormBackwardCall norm_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& weight,
                                      const std::optional<Tensor>& bias, const std::optional<Tensor>& residual,
                                      const std::optional<Tensor>& gain, const Tensor& mean, const Tensor& var,
                                      double eps, int64_t act, bool given) {
  NormBackwardCall call{};
  fill_norm(call, x, weight, bias, residual, gain, eps, act, &grad);
  const ScalarType wide = accumulation_type(call.dtype);
  fill_statistics(call, x, mean, var);
  call.grad = contiguous_input(call, grad);
  call.dx_tensor = torch::stable::new_empty(x, {call.rows, call.channels});
  call.dweight_tensor = torch::stable::new_empty(x, {call.channels}, wide);
  call.dbias_tensor = torch::stable::new_empty(x, {call.channels}, wide);
  const int64_t kept = residual ? call.rows : 0;
  call.dresidual_tensor = torch::stable::new_empty(x, {kept, call.channels}, grad.scalar_type());
  call.dx = call.dx_tensor.mutable_data_ptr();
  call.dweight = call.dweight_tensor.mutable_data_ptr();
  call.dbias = call.dbias_tensor.mutable_data_ptr();
  call.dresidual = residual ? call.dresidual_tensor.mutable_data_ptr() : nullptr;
  if (given) {
    call.dmean_tensor = torch::stable::new_empty(x, {call.channels}, wide);
    call.dvar_tensor = torch::stable::new_empty(x, {call.channels}, wide);
    call.dmean = call.dmean_tensor.mutable_data_ptr();
    call.dvar = call.dvar_tensor.mutable_data_ptr();
  }
  return call;
}

}  // namespace fer::bindings
