// One call of the norm operator as its compiled backend sees it: raw pointers, no torch.
// fer_kernels/norm/op.py states the contract, fer_kernels/norm/reference.py is the specification.
#pragma once
#include <cstdint>

#include "fer/dtype.h"

namespace fer {

// Rows are worked on in chunks of this many, however many threads there are: so sums have one order.
constexpr int64_t kNormRows = 64;

enum class NormAct : int { none, relu, gelu };  // the order of ACTS in fer_kernels/norm/op.py

// Every tensor is contiguous. Weight, bias, gain and statistics are double for f64, else float; so are residual,
// y and their gradients where `wide`, and otherwise of x's dtype.
struct NormCall {
  int64_t rows, channels, samples;
  Dtype dtype;
  double eps;
  NormAct act;
  bool wide;

  const void* x;         // (rows, C)
  const void* weight;    // null stands for ones
  const void* bias;      // null stands for zeros
  const void* residual;  // (rows, C), or null; the backward pass reads it for an activation alone
  const void* gain;      // (samples), each for as many rows; null stands for ones

  int64_t chunks() const { return (rows + kNormRows - 1) / kNormRows; }
};

struct NormForward : NormCall {
  void* y;  // (rows, C)
  void *mean, *var;
};

struct NormBackward : NormCall {
  const void* grad;  // (rows, C)
  const void *mean, *var;
  void* dx;         // (rows, C)
  void* dresidual;  // (rows, C), or null: not wanted, or the gradient itself
  void *dweight, *dbias;
  void *dmean, *dvar;  // (C), where the statistics are an input like any other; else null
};

}  // namespace fer
