// jad's tensors to the raw-pointer calls of csrc/include/fer/jad.h, for the bindings.
#pragma once
#include <vector>

#include "common.h"
#include "fer/jad.h"

namespace fer::bindings {

// A call, the contiguous tensors that it points into, and what is returned.
struct JadForwardCall : JadForward {
  std::vector<Tensor> inputs;
  Tensor out_tensor, lse_tensor, column_mean_tensor, bias_tensor, bits_tensor;
};
struct JadBackwardCall : JadBackward {
  std::vector<Tensor> inputs;
  Tensor dq_tensor, dk_tensor, dv_tensor;
};

// The Python front checks with better words; this keeps direct calls of torch.ops memory-safe.
template <class Call>
void fill_jad(Call& call, const Tensor& q, const Tensor& k, const std::optional<Tensor>& v, double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "jad: q must be (B, H, N, D), k (B, H, M, D)");
  call.batch = q.size(0), call.heads = q.size(1), call.queries = q.size(2), call.keys = k.size(2);
  call.width = q.size(3);
  STD_TORCH_CHECK(is_like(k, q, {call.batch, call.heads, call.keys, call.width}) &&
                      (!v || is_like(*v, q, {call.batch, call.heads, call.keys, call.width})),
                  "jad: k and v must be (B, H, M, D) of q's dtype and device");
  STD_TORCH_CHECK(call.keys <= INT32_MAX && call.queries <= INT32_MAX, "jad: at most ", INT32_MAX, " keys or queries");
  call.dtype = to_dtype(q.scalar_type());
  call.scale = scale;
  call.q = contiguous_input(call, q);
  call.k = contiguous_input(call, k);
  call.v = v ? contiguous_input(call, *v) : nullptr;
}

inline JadForwardCall jad_forward(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& gate,
                                  const std::optional<Tensor>& noise, int64_t mode, double beta, double max_drop,
                                  int64_t protect, double soft, double tau, bool joint_over_head, double scale,
                                  bool return_stats, bool save) {
  JadForwardCall call{};
  fill_jad(call, q, k, v, scale);
  STD_TORCH_CHECK(mode >= 0 && mode <= 5, "jad: unknown mode ", mode);
  STD_TORCH_CHECK(protect >= 0, "jad: protect must be at least 0, got ", protect);
  STD_TORCH_CHECK(max_drop >= 0 && max_drop < 1, "jad: max_drop must lie in [0, 1), got ", max_drop);
  call.mode = static_cast<JadMode>(mode);
  call.beta = beta, call.max_drop = max_drop, call.soft = soft, call.tau = tau, call.protect = protect;
  call.joint_over_head = joint_over_head;
  if (gate) {
    STD_TORCH_CHECK(is_shape(*gate, {call.batch, call.heads}) && gate->scalar_type() == ScalarType::Bool &&
                        gate->device() == q.device(),
                    "jad: gate must be a bool (B, H) on q's device");
    call.gate = static_cast<const bool*>(contiguous_input(call, *gate));
  }
  const bool random = call.mode == JadMode::random || call.mode == JadMode::dropkey;
  STD_TORCH_CHECK(!random || (noise && is_shape(*noise, {call.batch, call.heads, call.keys})),
                  "jad: this mode needs noise (B, H, M)");
  if (random)
    call.noise = static_cast<const double*>(
        contiguous_input(call, torch::stable::to(*noise, ScalarType::Double, std::nullopt, q.device())));

  using Shape = std::vector<int64_t>;
  const ScalarType accumulation = accumulation_type(call.dtype);
  const bool entry = call.mode == JadMode::entry, biased = !entry && call.mode != JadMode::none;
  const Shape per_key = {call.batch, call.heads, call.keys}, empty = {0};
  call.out_tensor = torch::stable::new_empty(q, Shape{call.batch, call.heads, call.queries, call.width});
  call.lse_tensor = torch::stable::new_empty(q, Shape{call.batch, call.heads, call.queries}, accumulation);
  call.column_mean_tensor = torch::stable::new_empty(q, return_stats ? per_key : empty, accumulation);
  call.bias_tensor = torch::stable::new_empty(q, biased ? per_key : empty, accumulation);
  const bool bits = entry && (return_stats || save);
  call.bits_tensor = torch::stable::new_empty(
      q, bits ? Shape{call.batch, call.heads, call.queries, (call.keys + 7) / 8} : empty, ScalarType::Byte);
  call.out = call.out_tensor.mutable_data_ptr();
  call.lse = call.lse_tensor.mutable_data_ptr();
  call.column_mean = return_stats ? call.column_mean_tensor.mutable_data_ptr() : nullptr;
  call.bias = biased ? call.bias_tensor.mutable_data_ptr() : nullptr;
  call.bits = bits ? static_cast<uint8_t*>(call.bits_tensor.mutable_data_ptr()) : nullptr;
  return call;
}

inline JadForwardCall jad_column_mean(const Tensor& q, const Tensor& k, double scale) {
  JadForwardCall call{};
  fill_jad(call, q, k, std::nullopt, scale);
  using Shape = std::vector<int64_t>;
  const ScalarType accumulation = accumulation_type(call.dtype);
  call.column_mean_tensor = torch::stable::new_empty(q, Shape{call.batch, call.heads, call.keys}, accumulation);
  call.lse_tensor = torch::stable::new_empty(q, Shape{call.batch, call.heads, call.queries}, accumulation);
  call.column_mean = call.column_mean_tensor.mutable_data_ptr();
  call.lse = call.lse_tensor.mutable_data_ptr();
  return call;
}

template <class Call>
void fill_jad_backward(Call& call, const Tensor& q, const Tensor& k, const Tensor& lse) {
  STD_TORCH_CHECK(is_shape(lse, {call.batch, call.heads, call.queries}) &&
                      lse.scalar_type() == accumulation_type(call.dtype) && lse.device() == q.device(),
                  "jad: lse must be (B, H, N), as the forward left it");
  call.lse = contiguous_input(call, lse);
  call.dq_tensor = torch::stable::new_empty(q, {call.batch, call.heads, call.queries, call.width});
  call.dk_tensor = torch::stable::new_empty(q, {call.batch, call.heads, call.keys, call.width});
  call.dq = call.dq_tensor.mutable_data_ptr();
  call.dk = call.dk_tensor.mutable_data_ptr();
}

inline JadBackwardCall jad_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v,
                                    const Tensor& lse, const Tensor& bias, const Tensor& bits, double scale) {
  JadBackwardCall call{};
  fill_jad(call, q, k, v, scale);
  fill_jad_backward(call, q, k, lse);
  STD_TORCH_CHECK(is_like(grad, q, {call.batch, call.heads, call.queries, call.width}),
                  "jad: the gradient must be (B, H, N, D) of q's dtype and device");
  call.grad = contiguous_input(call, grad);
  if (bias.numel() > 0) {
    STD_TORCH_CHECK(is_shape(bias, {call.batch, call.heads, call.keys}) &&
                        bias.scalar_type() == accumulation_type(call.dtype) && bias.device() == q.device(),
                    "jad: bias must be (B, H, M), as the forward left it");
    call.bias = contiguous_input(call, bias);
  }
  if (bits.numel() > 0) {
    STD_TORCH_CHECK(is_shape(bits, {call.batch, call.heads, call.queries, (call.keys + 7) / 8}) &&
                        bits.scalar_type() == ScalarType::Byte && bits.device() == q.device(),
                    "jad: bits must be (B, H, N, ceil(M / 8)), as the forward left them");
    call.bits = static_cast<const uint8_t*>(contiguous_input(call, bits));
  }
  call.dv_tensor = torch::stable::new_empty(q, {call.batch, call.heads, call.keys, call.width});
  call.dv = call.dv_tensor.mutable_data_ptr();
  return call;
}

inline JadBackwardCall jad_column_mean_backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& lse,
                                                double scale) {
  JadBackwardCall call{};
  fill_jad(call, q, k, std::nullopt, scale);
  fill_jad_backward(call, q, k, lse);
  STD_TORCH_CHECK(is_shape(grad, {call.batch, call.heads, call.keys}) &&
                      grad.scalar_type() == accumulation_type(call.dtype) && grad.device() == q.device(),
                  "jad: the gradient must be (B, H, M), as the column means are");
  call.grad_means = contiguous_input(call, grad);
  return call;
}

}  // namespace fer::bindings
