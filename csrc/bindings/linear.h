// linear's tensors to the raw-pointer calls of csrc/include/fer/linear.h.
#pragma once
#include <vector>

#include "common.h"
#include "fer/linear.h"

namespace fer::bindings {

// A call, the contiguous tensors that it points into, and what is returned.
struct LinearForwardCall : LinearForward {
  std::vector<Tensor> inputs;
  std::vector<double> parts_of_all;
  Tensor y_tensor, mean_tensor, var_tensor;
};
struct LinearBackwardCall : LinearBackward {
  std::vector<Tensor> inputs;
  std::vector<double> parts_of_all;
  Tensor dx_tensor, dm_tensor, dweight_tensor;
  Tensor dnorm[4];  // of mean, var, scale and shift
};

// What both directions take. The Python front checks with better words; this keeps direct calls of torch.ops
// memory-safe.
template <class Call>
const float* float_input(Call& call, const Tensor& tensor) {
  return static_cast<const float*>(contiguous_input(call, tensor));
}
inline void* output(const Tensor& tensor, bool wanted) { return wanted ? tensor.mutable_data_ptr() : nullptr; }
inline float* float_output(const Tensor& tensor, bool wanted) { return static_cast<float*>(output(tensor, wanted)); }
inline bool is_float(const Tensor& t, const Tensor& beside, std::initializer_list<int64_t> shape) {
  return is_shape(t, shape) && t.scalar_type() == ScalarType::Float && t.device() == beside.device();
}

template <class Call>
void fill_linear(Call& call, const Tensor& x, const std::optional<Tensor>& m, const Tensor& weight, int64_t groups) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && groups >= 1, "linear: x (rows, C) and weight must be 2-D");
  call.dtype = to_dtype(x.scalar_type());
  STD_TORCH_CHECK(call.dtype == Dtype::f32 || call.dtype == Dtype::bf16, "linear: x must be float32 or bfloat16");
  call.rows = x.size(0), call.groups = groups;
  call.in = x.size(1) / groups, call.out = weight.size(0) / groups, call.sides = m ? 2 : 1;
  STD_TORCH_CHECK(call.in >= 1 && call.out >= 1 && x.size(1) == groups * call.in &&
                      is_float(weight, x, {groups * call.out, call.in * call.sides}),
                  "linear: weight must be (C_out, C_in / groups), groups divide both, and be float32");
  STD_TORCH_CHECK(!m || is_like(*m, x, {call.rows, groups * call.in}), "linear: m must be as x");
  call.x = contiguous_input(call, x);
  call.m = m ? contiguous_input(call, *m) : nullptr;
  call.weight = float_input(call, weight);
}

inline LinearForwardCall linear_forward(const Tensor& x, const std::optional<Tensor>& m, const Tensor& weight,
                                        const std::optional<Tensor>& bias, int64_t groups) {
  LinearForwardCall call{};
  fill_linear(call, x, m, weight, groups);
  const int64_t out = groups * call.out;
  STD_TORCH_CHECK(!bias || is_float(*bias, x, {out}), "linear: bias must be (C_out,) and float32");
  call.bias = bias ? float_input(call, *bias) : nullptr;
  call.y_tensor = torch::stable::new_empty(x, {call.rows, out});
  call.y = output(call.y_tensor, true);
  return call;
}

inline LinearBackwardCall linear_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& m,
                                          const Tensor& weight, int64_t groups, bool need_nodes, bool need_weight) {
  LinearBackwardCall call{};
  fill_linear(call, x, m, weight, groups);
  STD_TORCH_CHECK(is_like(grad, x, {call.rows, groups * call.out}), "linear: the gradient must be (rows, C_out) and as x");
  call.grad = contiguous_input(call, grad);
  const int64_t rows = need_nodes ? call.rows : 0, out = need_weight ? groups * call.out : 0;
  call.dx_tensor = torch::stable::new_empty(x, {rows, groups * call.in});
  call.dm_tensor = torch::stable::new_empty(x, {m ? rows : 0, groups * call.in});
  call.dweight_tensor = torch::stable::new_empty(weight, {out, weight.size(1)});
  call.dx = output(call.dx_tensor, need_nodes);
  call.dm = output(call.dm_tensor, need_nodes && m);
  call.dweight = float_output(call.dweight_tensor, need_weight);
  return call;
}

// x's norm, where it has one, over its `channels`: its statistics, and a weight and bias or null.
template <class Call>
void fill_linear_norm(Call& call, const Tensor& x, int64_t channels, const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                      const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, double eps, int64_t act) {
  STD_TORCH_CHECK(act >= 0 && act <= static_cast<int64_t>(NormAct::gelu), "linear: unknown act ", act);
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "linear: x has both statistics or none");
  STD_TORCH_CHECK(mean || (!scale && !shift && act == 0), "linear: without statistics there is no norm");
  STD_TORCH_CHECK(!mean || call.sides == 1, "linear: x has no norm beside m");
  const float** to[] = {&call.mean, &call.var, &call.scale, &call.shift};
  const std::optional<Tensor>* from[] = {&mean, &var, &scale, &shift};
  for (int i = 0; i < 4; ++i) {
    if (!*from[i]) continue;
    STD_TORCH_CHECK(is_float(**from[i], x, {channels}), "linear: a norm's tensors must be (C_in,) and float32");
    *to[i] = float_input(call, **from[i]);
  }
  call.channels = channels, call.eps = eps, call.act = static_cast<NormAct>(act);
}

// y's statistics, made of parts of each chunk of rows.
inline void want_statistics(LinearForwardCall& call, const Tensor& x, int64_t chunk) {
  STD_TORCH_CHECK(call.rows >= 1, "linear: statistics need a row");
  const int64_t out = call.groups * call.out;
  call.mean_tensor = torch::stable::new_empty(x, {out}, ScalarType::Float);
  call.var_tensor = torch::stable::new_empty(x, {out}, ScalarType::Float);
  call.y_mean = float_output(call.mean_tensor, true);
  call.y_var = float_output(call.var_tensor, true);
  call.parts_of_all.resize((call.rows + chunk - 1) / chunk * 2 * out);
  call.parts = call.parts_of_all.data();
}

inline LinearForwardCall linear_normed_forward(const Tensor& x, const std::optional<Tensor>& m, const Tensor& weight,
                                               const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                                               const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                                               int64_t groups, double eps, int64_t act, int64_t chunk) {
  LinearForwardCall call = linear_forward(x, m, weight, std::nullopt, groups);
  fill_linear_norm(call, x, x.size(1), mean, var, scale, shift, eps, act);
  want_statistics(call, x, chunk);
  return call;
}

// y, of whose statistics there are gradients.
inline void fill_results(LinearBackwardCall& call, const Tensor& dy_mean, const Tensor& dy_var, const Tensor& y,
                         const Tensor& y_mean) {
  const int64_t out = call.groups * call.out;
  STD_TORCH_CHECK(is_float(y_mean, y, {out}) && is_float(dy_mean, y, {out}) && is_float(dy_var, y, {out}),
                  "linear: y's statistics and their gradients must be (C_out,) and float32");
  call.y = contiguous_input(call, y);
  call.results = call.rows;
  call.y_mean = float_input(call, y_mean);
  call.dy_mean = float_input(call, dy_mean);
  call.dy_var = float_input(call, dy_var);
}

// The gradients of x's norm over so many channels; none where it has none.
inline void want_norm(LinearBackwardCall& call, const Tensor& x, int64_t channels) {
  float** to[] = {&call.dmean, &call.dvar, &call.dscale, &call.dshift};
  for (int i = 0; i < 4; ++i) {
    call.dnorm[i] = torch::stable::new_empty(x, {channels}, ScalarType::Float);
    *to[i] = float_output(call.dnorm[i], channels > 0);
  }
}

inline LinearBackwardCall linear_normed_backward(const Tensor& grad, const Tensor& dy_mean, const Tensor& dy_var, const Tensor& x,
                                                 const std::optional<Tensor>& m, const Tensor& weight,
                                                 const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                                                 const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
                                                 const Tensor& y, const Tensor& y_mean, int64_t groups, double eps, int64_t act,
                                                 bool need_nodes, bool need_weight, int64_t chunk) {
  LinearBackwardCall call = linear_backward(grad, x, m, weight, groups, need_nodes, need_weight);
  const int64_t in = need_nodes && mean ? x.size(1) : 0;
  STD_TORCH_CHECK(is_like(y, x, {call.rows, groups * call.out}), "linear: y must be as its gradient");
  fill_linear_norm(call, x, x.size(1), mean, var, scale, shift, eps, act);
  fill_results(call, dy_mean, dy_var, y, y_mean);
  want_norm(call, x, in);
  call.parts_of_all.resize((call.rows + chunk - 1) / chunk * 2 * in);
  call.parts = call.parts_of_all.data();
  return call;
}

}  // namespace fer::bindings
