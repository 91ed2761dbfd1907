// One call of the norm operator as its compiled backend sees it: raw pointers, no torch.
// fer_kernels/norm/op.py states the contract, fer_kernels/norm/reference.py is the specification.
#pragma once
#include <cstdint>

#include "fer/dtype.h"

namespace fer {

// Rows are worked on in chunks of this many, however many threads there are: so sums have one order.
constexpr int64_t kNormRows = 64;

// Every tensor is contiguous. Weight, bias and statistics (C) are double for f64, else float.
struct NormCall {
  int64_t rows, channels;
  Dtype dtype;
  double eps;
  bool gelu;

  const void* x;       // (rows, C)
  const void* weight;  // null stands for ones
  const void* bias;    // null stands for zeros

  int64_t chunks() const { return (rows + kNormRows - 1) / kNormRows; }
};

struct NormForward : NormCall {
  void* y;  // (rows, C)
  void *mean, *var;
};

struct NormBackward : NormCall {
  const void* grad;  // (rows, C)
  const void *mean, *var;
  void* dx;  // (rows, C)
  void *dweight, *dbias;
};

}  // namespace fer
