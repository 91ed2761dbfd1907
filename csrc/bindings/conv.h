// conv's tensors to calls of csrc/include/fer/linear.h, whose rows are windows of a map.
#pragma once
#include <cstring>
#include <vector>

#include "bindings/linear.h"

namespace fer::bindings {

struct ConvShape {
  int64_t images, height, width, in, out, high, wide, stride, padding;
  int64_t down, across;  // of what comes out
  int64_t rows() const { return images * down * across; }
  int64_t terms() const { return high * wide * in; }
  Windows windows() const { return {high, wide, down, across, stride, -padding, -padding, height, width, in}; }
};

inline ConvShape conv_shape(const Tensor& x, const Tensor& weight, int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, "conv: x (B, H, W, C) and weight (C_out, high, wide, C) must be 4-D");
  ConvShape shape{x.size(0), x.size(1), x.size(2), x.size(3), weight.size(0), weight.size(1), weight.size(2), stride, padding};
  STD_TORCH_CHECK(shape.in >= 1 && shape.out >= 1 && is_float(weight, x, {shape.out, shape.high, shape.wide, shape.in}),
                  "conv: weight must be (C_out, high, wide, C) and float32");
  STD_TORCH_CHECK(stride >= 1 && stride <= std::min(shape.high, shape.wide) && padding >= 0 &&
                      padding < std::min(shape.high, shape.wide),
                  "conv: 1 <= stride <= the weight's sides, and 0 <= padding < those");
  STD_TORCH_CHECK(shape.height + 2 * padding >= shape.high && shape.width + 2 * padding >= shape.wide,
                  "conv: x must not be smaller than the weight");
  shape.down = (shape.height + 2 * padding - shape.high) / stride + 1;
  shape.across = (shape.width + 2 * padding - shape.wide) / stride + 1;
  STD_TORCH_CHECK(shape.images >= 1 && shape.height >= 1 && shape.width >= 1, "conv: x must not be empty");
  return shape;
}

template <class Call>
void fill_conv(Call& call, const ConvShape& shape, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& mean,
               const std::optional<Tensor>& var, const std::optional<Tensor>& scale, const std::optional<Tensor>& shift,
               double eps, int64_t act) {
  call.dtype = to_dtype(x.scalar_type());
  call.rows = shape.rows(), call.groups = 1, call.sides = 1;
  call.in = shape.terms(), call.out = shape.out;
  call.x = contiguous_input(call, x);
  call.weight = float_input(call, weight);
  call.windows = shape.windows();
  fill_linear_norm(call, x, shape.in, mean, var, scale, shift, eps, act);
}

inline LinearForwardCall conv_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& mean,
                                      const std::optional<Tensor>& var, const std::optional<Tensor>& scale,
                                      const std::optional<Tensor>& shift, int64_t stride, int64_t padding, double eps,
                                      int64_t act, int64_t chunk) {
  const ConvShape shape = conv_shape(x, weight, stride, padding);
  LinearForwardCall call{};
  fill_conv(call, shape, x, weight, mean, var, scale, shift, eps, act);
  call.y_tensor = torch::stable::new_empty(x, {shape.images, shape.down, shape.across, shape.out});
  call.y = output(call.y_tensor, true);
  want_statistics(call, x, chunk);
  return call;
}

constexpr int64_t kNarrow = 64;

// The weight's gradient is that of a product of windows. x's is a product too, of windows of y's gradient: for each of
// stride * stride kinds of pixels, which meet different pixels of the weight.
struct ConvBackwardCall : LinearBackwardCall {
  ConvShape shape;
  std::vector<LinearBackward> kinds;
  std::vector<std::vector<float>> weights;  // of each kind
  int64_t chunks = 0;                       // of all
};

inline ConvBackwardCall conv_backward(const Tensor& grad, const Tensor& dy_mean, const Tensor& dy_var, const Tensor& x,
                                      const Tensor& weight, const std::optional<Tensor>& mean,
                                      const std::optional<Tensor>& var, const std::optional<Tensor>& scale,
                                      const std::optional<Tensor>& shift, const Tensor& y, const Tensor& y_mean,
                                      int64_t stride, int64_t padding, double eps, int64_t act, bool need_map,
                                      bool need_weight, int64_t chunk) {
  ConvBackwardCall call{};
  call.shape = conv_shape(x, weight, stride, padding);
  const ConvShape& shape = call.shape;
  fill_conv(call, shape, x, weight, mean, var, scale, shift, eps, act);
  STD_TORCH_CHECK(is_like(grad, x, {shape.images, shape.down, shape.across, shape.out}) &&
                      is_like(y, x, {shape.images, shape.down, shape.across, shape.out}),
                  "conv: y and its gradient must be (B, down, across, C_out) and as x");
  call.grad = contiguous_input(call, grad);
  fill_results(call, dy_mean, dy_var, y, y_mean);
  call.dx_tensor = need_map ? torch::stable::new_empty(x, {shape.images, shape.height, shape.width, shape.in})
                            : torch::stable::new_empty(x, {0, 0, 0, shape.in});
  call.dweight_tensor = torch::stable::new_empty(weight, {need_weight ? shape.out : 0, shape.high, shape.wide, shape.in});
  call.dx = output(call.dx_tensor, need_map);
  call.dweight = float_output(call.dweight_tensor, need_weight);
  want_norm(call, x, need_map && mean ? shape.in : 0);
  if (!need_map) return call;

  // Pixel at + i * stride, along one side, meets number `least` + n * stride of the weight's in windows i + base - n.
  struct Kind {
    int64_t stride, least, count, base;
    Kind(int64_t at, int64_t stride, int64_t padding, int64_t side)
        : stride(stride), least((at + padding) % stride), count((side - least + stride - 1) / stride),
          base((at + padding - least) / stride) {}
    int64_t first() const { return base - (count - 1); }
    int64_t met_in(int64_t window) const {  // of the weight's, or -1
      const int64_t n = base - window;
      return n >= 0 && n < count ? least + n * stride : -1;
    }
  };
  // Narrow pixels are taken as many at once as there are kinds of them in a line: for longer sums over more columns it
  // pays to multiply zeros.
  const int64_t each = shape.width % stride == 0 && shape.in <= kNarrow ? stride : 1;
  for (int64_t top = 0; top < std::min(stride, shape.height); ++top)
    for (int64_t left = 0; left < std::min(stride, shape.width); left += each) {
      const Kind line(top, stride, padding, shape.high);
      std::vector<Kind> columns;
      for (int64_t i = 0; i < each; ++i) columns.emplace_back(left + i, stride, padding, shape.wide);
      int64_t from = columns[0].first(), until = columns[0].base + 1;
      for (const Kind& column : columns) from = std::min(from, column.first()), until = std::max(until, column.base + 1);
      const int64_t down = (shape.height - top + stride - 1) / stride, across = (shape.width - left + stride - 1) / stride;
      LinearBackward kind = call;
      kind.windows = {};
      kind.rows = shape.images * down * across;
      kind.in = each * shape.in, kind.out = line.count * (until - from) * shape.out;
      kind.places = {1, 1, down, across, stride, top, left, shape.height, shape.width, shape.in};
      kind.grad_windows = {line.count, until - from, down, across, 1, line.first(), from, shape.down, shape.across, shape.out};
      std::vector<float> weight(kind.out * kind.in);
      float* to = weight.data();
      for (int64_t i = line.first(); i <= line.base; ++i)
        for (int64_t j = from; j < until; ++j)
          for (int64_t o = 0; o < shape.out; ++o)
            for (const Kind& column : columns) {
              const int64_t w = column.met_in(j);
              if (w >= 0)
                std::memcpy(to, call.weight + ((o * shape.high + line.met_in(i)) * shape.wide + w) * shape.in, shape.in * sizeof(float));
              to += shape.in;
            }
      call.weights.push_back(std::move(weight));
      call.kinds.push_back(kind);
      call.chunks += (kind.rows + chunk - 1) / chunk;
    }
  call.parts_of_all.resize(mean ? call.chunks * 2 * each * shape.in : 0);
  double* parts = call.parts_of_all.data();
  for (size_t i = 0; i < call.kinds.size(); ++i) {
    call.kinds[i].weight = call.weights[i].data();
    call.kinds[i].parts = parts;
    parts += (call.kinds[i].rows + chunk - 1) / chunk * 2 * call.kinds[i].in;
  }
  call.parts = call.parts_of_all.data();
  return call;
}

}  // namespace fer::bindings
