// One call of the linear operator as its compiled backend sees it: raw pointers, no torch.
// fer_kernels/linear/op.py states the contract, fer_kernels/linear/reference.py is the specification.
#pragma once
#include <cstdint>

namespace fer {

// Every tensor is contiguous float32. With m, a group's columns are interleaved in the weight: x0, m0, x1, ...
struct LinearCall {
  int64_t rows, groups;
  int64_t in, out;  // channels of one group: of x, and of m; of y
  int64_t sides;    // 2 with m, which has no address where there are no rows; else 1

  const float* x;       // (rows, groups * in)
  const float* m;       // the same, or null
  const float* weight;  // (groups * out, sides * in)
};

struct LinearForward : LinearCall {
  const float* bias;  // (groups * out), or null
  float* y;           // (rows, groups * out)
};

struct LinearBackward : LinearCall {
  const float* grad;  // (rows, groups * out)
  float *dx, *dm;     // as x and m; null: not wanted
  float* dweight;     // as the weight, or null: not wanted
};

}  // namespace fer
