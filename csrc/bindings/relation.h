// relation's tensors to the raw-pointer calls of csrc/include/fer/relation.h, for both bindings.
#pragma once
#include <vector>

#include "common.h"
#include "fer/relation.h"

namespace fer::bindings {

// A call, the contiguous tensors that it points into, and what is returned.
struct RelationForwardCall : RelationForward {
  std::vector<Tensor> inputs;
  Tensor out_tensor, weights_tensor, slots_tensor;
};
struct RelationBackwardCall : RelationBackward {
  std::vector<Tensor> inputs;
  Tensor dx_tensor, dy_tensor, dp_tensor, dq_tensor, da_tensor;
};

// The Python front checks with better words; this keeps direct calls of torch.ops memory-safe. `like` is x
// or the gradient of what x's node became.
template <class Call>
void fill_relation(Call& call, const Tensor& like, const std::optional<Tensor>& x, const Tensor& idx,
                   const std::optional<Tensor>& y, const std::optional<Tensor>& p, const std::optional<Tensor>& q,
                   const std::optional<Tensor>& a, int64_t keys, int64_t mode, double negative_slope) {
  STD_TORCH_CHECK(like.dim() == 3, "relation: x must be (B, N, C)");
  const int64_t batch = like.size(0), queries = like.size(1), channels = like.size(2);
  STD_TORCH_CHECK(idx.dim() == 3 && idx.size(0) == batch && idx.size(1) == queries && idx.size(2) >= 1 &&
                      idx.size(2) <= 128 && idx.scalar_type() == ScalarType::Long && idx.device() == like.device(),
                  "relation: idx must be an int64 (B, N, k) on x's device with k from 1 to 128");
  STD_TORCH_CHECK(keys >= 0 && keys <= INT32_MAX && queries * idx.size(2) <= INT32_MAX,
                  "relation: at most ", INT32_MAX, " keys, and as many edges a sample");
  STD_TORCH_CHECK(mode >= 0 && mode <= 2, "relation: unknown mode ", mode);
  call.batch = batch, call.queries = queries, call.keys = keys, call.channels = channels;
  call.k = static_cast<int>(idx.size(2));
  call.dtype = to_dtype(like.scalar_type());
  call.mode = static_cast<RelationMode>(mode);
  call.negative_slope = negative_slope;
  call.heads = 1, call.width = 0;
  call.idx = static_cast<const int64_t*>(contiguous_input(call, idx));

  if (x) {
    STD_TORCH_CHECK(is_like(*x, like, {batch, queries, channels}), "relation: x must be (B, N, C)");
    call.x = contiguous_input(call, *x);
    STD_TORCH_CHECK(y ? is_like(*y, like, {batch, keys, channels}) : keys == queries,
                    "relation: y must be (B, M, C) of x's dtype and device");
    call.y = y ? contiguous_input(call, *y) : call.x;
  }
  if (call.mode == RelationMode::mr) return;
  STD_TORCH_CHECK(p && q && a && a->dim() == 2 && a->size(0) >= 1, "relation: this mode needs p, q and a");
  call.heads = a->size(0), call.width = a->size(1);
  const int64_t relation = call.heads * call.width;
  STD_TORCH_CHECK(channels % call.heads == 0 && is_like(*p, like, {batch, queries, relation}) &&
                      is_like(*q, like, {batch, keys, relation}) && is_like(*a, like, {call.heads, call.width}),
                  "relation: p must be (B, N, R), q (B, M, R), a (H, R / H) of x's dtype and device, and H divide C");
  call.p = contiguous_input(call, *p);
  call.q = contiguous_input(call, *q);
  call.a = contiguous_input(call, *a);
}

inline RelationForwardCall relation_forward(const Tensor& x, const Tensor& idx, const std::optional<Tensor>& y,
                                            const std::optional<Tensor>& p, const std::optional<Tensor>& q,
                                            const std::optional<Tensor>& a, int64_t mode, double negative_slope,
                                            bool return_weights, bool save_slots) {
  RelationForwardCall call{};
  STD_TORCH_CHECK(x.dim() == 3 && (!y || y->dim() == 3), "relation: x must be (B, N, C), y (B, M, C)");
  fill_relation(call, x, x, idx, y, p, q, a, y ? y->size(1) : x.size(1), mode, negative_slope);
  const bool slots = save_slots && call.mode != RelationMode::rsum;
  const bool weights = return_weights && call.mode != RelationMode::mr;
  using Shape = std::vector<int64_t>;
  call.out_tensor = torch::stable::new_empty(x, Shape{call.batch, call.queries, call.channels});
  call.weights_tensor = torch::stable::new_empty(
      x, weights ? Shape{call.batch, call.queries, call.k, call.heads} : Shape{0});
  call.slots_tensor = torch::stable::new_empty(
      x, slots ? Shape{call.batch, call.queries, call.channels} : Shape{0}, ScalarType::Byte);
  call.out = call.out_tensor.mutable_data_ptr();
  call.weights = weights ? call.weights_tensor.mutable_data_ptr() : nullptr;
  call.slots = slots ? static_cast<uint8_t*>(call.slots_tensor.mutable_data_ptr()) : nullptr;
  return call;
}

// `reverse` is left to the binding: the CPU does without.
inline RelationBackwardCall relation_backward(const Tensor& grad, const std::optional<Tensor>& grad_weights,
                                              const std::optional<Tensor>& x, const Tensor& idx,
                                              const std::optional<Tensor>& y, const std::optional<Tensor>& p,
                                              const std::optional<Tensor>& q, const std::optional<Tensor>& a,
                                              const std::optional<Tensor>& slots, int64_t keys, bool own_keys,
                                              int64_t mode, double negative_slope, bool need_nodes,
                                              bool need_relation) {
  RelationBackwardCall call{};
  STD_TORCH_CHECK(grad.dim() == 3 && (!own_keys || keys == grad.size(1)), "relation: bad gradient or keys");
  STD_TORCH_CHECK(!need_relation || (x && mode != 0 && (own_keys || y)),
                  "relation: the relation's gradient needs x and y, and a mode that has one");
  fill_relation(call, grad, x, idx, y, p, q, a, keys, mode, negative_slope);
  call.own_keys = own_keys, call.need_nodes = need_nodes, call.need_relation = need_relation;
  const int64_t relation = call.heads * call.width;
  call.grad = contiguous_input(call, grad);
  if (call.mode != RelationMode::rsum) {
    STD_TORCH_CHECK(slots && is_shape(*slots, {call.batch, call.queries, call.channels}) &&
                        slots->scalar_type() == ScalarType::Byte && slots->device() == grad.device(),
                    "relation: slots must be a uint8 (B, N, C): was the forward called with save_slots?");
    call.slots = static_cast<const uint8_t*>(contiguous_input(call, *slots));
  }
  if (grad_weights && call.mode != RelationMode::mr) {
    STD_TORCH_CHECK(is_like(*grad_weights, grad, {call.batch, call.queries, call.k, call.heads}),
                    "relation: the weights' gradient must be (B, N, k, H)");
    call.grad_weights = contiguous_input(call, *grad_weights);
  }
  using Shape = std::vector<int64_t>;
  const auto output = [&](bool wanted, Shape shape, Tensor& tensor, void*& pointer) {
    tensor = torch::stable::new_empty(grad, wanted ? shape : Shape{0});
    pointer = wanted ? tensor.mutable_data_ptr() : nullptr;
  };
  output(need_nodes, {call.batch, call.queries, call.channels}, call.dx_tensor, call.dx);
  output(need_nodes && !own_keys, {call.batch, keys, call.channels}, call.dy_tensor, call.dy);
  output(need_relation, {call.batch, call.queries, relation}, call.dp_tensor, call.dp);
  output(need_relation, {call.batch, keys, relation}, call.dq_tensor, call.dq);
  output(need_relation, {call.heads, call.width}, call.da_tensor, call.da);
  return call;
}

}  // namespace fer::bindings
