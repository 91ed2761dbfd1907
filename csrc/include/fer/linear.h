// One call of the linear operator as its compiled backend sees it: raw pointers, no torch.
// fer_kernels/linear/op.py states the contract, fer_kernels/linear/reference.py is the specification.
#pragma once
#include <cstdint>

#include "fer/dtype.h"
#include "fer/norm.h"

namespace fer {

// Windows of a map, channels last: that of line i and column j of an image begins at pixel (i * step + top,
// j * step + left). What of it lies outside the map is zeros.
struct Windows {
  int64_t high = 0, wide = 0;       // pixels of a window; none: there are no windows
  int64_t down = 0, across = 0;     // lines and columns of windows
  int64_t step = 1, top = 0, left = 0;
  int64_t height = 0, width = 0, channels = 0;  // of the map
  explicit operator bool() const { return high > 0; }
};

// Every tensor is contiguous, and float32 but for those of nodes and their gradients, which are of `dtype`: float32,
// or bfloat16. With m, a group's columns are interleaved in the weight: x0, m0, x1, ...
struct LinearCall {
  Dtype dtype;
  int64_t rows, groups;
  int64_t in, out;  // channels of one group: of x, and of m; of y
  int64_t sides;    // 2 with m, which has no address where there are no rows; else 1

  const void* x;        // (rows, groups * in)
  const void* m;        // the same, or null
  const float* weight;  // (groups * out, sides * in)

  // What is multiplied is act((x - mean) / sqrt(var + eps) * scale + shift); mean is null where it is x. Without m.
  const float *mean = nullptr, *var = nullptr, *scale = nullptr, *shift = nullptr;  // (channels)
  int64_t channels = 0;  // that a norm has: groups * in, or what of x's columns are several times as many
  double eps = 0;
  NormAct act = NormAct::none;

  // Where there are any, rows of x are windows of (images, height, width, channels), `in` numbers each, and have one
  // group. A norm is of the map's channels, and leaves the zeros around it.
  Windows windows = {};

  double* parts = nullptr;  // two numbers for each chunk of rows and channel that is summed over rows
};

struct LinearForward : LinearCall {
  const float* bias;  // (groups * out), or null
  void* y;            // (rows, groups * out)
  float *y_mean = nullptr, *y_var = nullptr;  // (groups * out), or null: not wanted
};

struct LinearBackward : LinearCall {
  const void* grad;  // (rows, groups * out)
  void *dx, *dm;     // as x and m; null: not wanted
  float* dweight;    // as the weight, or null: not wanted

  // Of y's statistics, where they were wanted; else y is null.
  const void* y = nullptr;  // (results, groups * out)
  int64_t results = 0;      // rows of y
  const float *y_mean = nullptr, *dy_mean = nullptr, *dy_var = nullptr;
  // Of x's norm, where there is one, along with dx.
  float *dmean = nullptr, *dvar = nullptr, *dscale = nullptr, *dshift = nullptr;

  // The gradient of windows' map: `rows` of `in` numbers of it, whole pixels, that begin where the windows `places` do;
  // and the windows of y's gradient, of `out` numbers each, that they come from.
  Windows places = {}, grad_windows = {};
};

}  // namespace fer
