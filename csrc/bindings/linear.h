// linear's tensors to the raw-pointer calls of csrc/include/fer/linear.h.
#pragma once
#include <vector>

#include "common.h"
#include "fer/linear.h"

namespace fer::bindings {

// A call, the contiguous tensors that it points into, and what is returned.
struct LinearForwardCall : LinearForward {
  std::vector<Tensor> inputs;
  Tensor y_tensor;
};
struct LinearBackwardCall : LinearBackward {
  std::vector<Tensor> inputs;
  Tensor dx_tensor, dm_tensor, dweight_tensor;
};

// What both directions take. The Python front checks with better words; this keeps direct calls of torch.ops
// memory-safe.
template <class Call>
const float* float_input(Call& call, const Tensor& tensor) {
  return static_cast<const float*>(contiguous_input(call, tensor));
}
inline float* float_output(const Tensor& tensor, bool wanted) {
  return wanted ? static_cast<float*>(tensor.mutable_data_ptr()) : nullptr;
}

template <class Call>
void fill_linear(Call& call, const Tensor& x, const std::optional<Tensor>& m, const Tensor& weight, int64_t groups) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && groups >= 1, "linear: x (rows, C) and weight must be 2-D");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "linear: x must be float32");
  call.rows = x.size(0), call.groups = groups;
  call.in = x.size(1) / groups, call.out = weight.size(0) / groups, call.sides = m ? 2 : 1;
  STD_TORCH_CHECK(call.in >= 1 && call.out >= 1 && x.size(1) == groups * call.in &&
                      is_like(weight, x, {groups * call.out, call.in * call.sides}),
                  "linear: weight must be (C_out, C_in / groups), groups divide both, and be as x");
  STD_TORCH_CHECK(!m || is_like(*m, x, {call.rows, groups * call.in}), "linear: m must be as x");
  call.x = float_input(call, x);
  call.m = m ? float_input(call, *m) : nullptr;
  call.weight = float_input(call, weight);
}

inline LinearForwardCall linear_forward(const Tensor& x, const std::optional<Tensor>& m, const Tensor& weight,
                                        const std::optional<Tensor>& bias, int64_t groups) {
  LinearForwardCall call{};
  fill_linear(call, x, m, weight, groups);
  const int64_t out = groups * call.out;
  STD_TORCH_CHECK(!bias || is_like(*bias, x, {out}), "linear: bias must be (C_out,) and as x");
  call.bias = bias ? float_input(call, *bias) : nullptr;
  call.y_tensor = torch::stable::new_empty(x, {call.rows, out});
  call.y = float_output(call.y_tensor, true);
  return call;
}

inline LinearBackwardCall linear_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& m,
                                          const Tensor& weight, int64_t groups, bool need_nodes, bool need_weight) {
  LinearBackwardCall call{};
  fill_linear(call, x, m, weight, groups);
  STD_TORCH_CHECK(is_like(grad, x, {call.rows, groups * call.out}), "linear: the gradient must be (rows, C_out) and as x");
  call.grad = float_input(call, grad);
  const int64_t rows = need_nodes ? call.rows : 0, out = need_weight ? groups * call.out : 0;
  call.dx_tensor = torch::stable::new_empty(x, {rows, groups * call.in});
  call.dm_tensor = torch::stable::new_empty(x, {m ? rows : 0, groups * call.in});
  call.dweight_tensor = torch::stable::new_empty(weight, {out, weight.size(1)});
  call.dx = float_output(call.dx_tensor, need_nodes);
  call.dm = float_output(call.dm_tensor, need_nodes && m);
  call.dweight = float_output(call.dweight_tensor, need_weight);
  return call;
}

}  // namespace fer::bindings
