// One call of the linear operator as its compiled backend sees it: raw pointers, no torch.
// fer_kernels/linear/op.py states the contract, fer_kernels/linear/reference.py is the specification.
#pragma once
#include <cstdint>

#include "fer/norm.h"

namespace fer {

// Every tensor is contiguous float32. With m, a group's columns are interleaved in the weight: x0, m0, x1, ...
struct LinearCall {
  int64_t rows, groups;
  int64_t in, out;  // channels of one group: of x, and of m; of y
  int64_t sides;    // 2 with m, which has no address where there are no rows; else 1

  const float* x;       // (rows, groups * in)
  const float* m;       // the same, or null
  const float* weight;  // (groups * out, sides * in)

  // What is multiplied is act((x - mean) / sqrt(var + eps) * scale + shift); mean is null where it is x. Without m.
  const float *mean = nullptr, *var = nullptr, *scale = nullptr, *shift = nullptr;  // (groups * in)
  double eps = 0;
  NormAct act = NormAct::none;

  double* parts = nullptr;  // two numbers for each chunk of rows and channel that is summed over rows
};

struct LinearForward : LinearCall {
  const float* bias;  // (groups * out), or null
  float* y;           // (rows, groups * out)
  float *y_mean = nullptr, *y_var = nullptr;  // (groups * out), or null: not wanted
};

struct LinearBackward : LinearCall {
  const float* grad;  // (rows, groups * out)
  float *dx, *dm;     // as x and m; null: not wanted
  float* dweight;     // as the weight, or null: not wanted

  // Of y's statistics, where they were wanted; else y is null.
  const float *y = nullptr, *y_mean = nullptr, *dy_mean = nullptr, *dy_var = nullptr;
  // Of x's norm, where there is one, along with dx.
  float *dmean = nullptr, *dvar = nullptr, *dscale = nullptr, *dshift = nullptr;
};

}  // namespace fer
