// One call of the knn operator as its compiled backends see it: raw pointers, no torch.
// fer_kernels/knn/op.py states the contract, fer_kernels/knn/reference.py is the specification.
#pragma once
#include <cstdint>

#include "fer/dtype.h"

namespace fer {

constexpr int kMaxNeighbours = 128;  // the largest k * dilation

struct KnnCall {
  int64_t batch, queries, keys, channels;  // B, N, M, C
  int k, dilation;
  Dtype dtype;
  bool normalize;
  bool allow_tf32;  // float32 products on a GPU only

  const void* x;  // (B, N, C), contiguous
  const void* y;  // (B, M, C), contiguous; null: the keys are x
  const void* bias;  // null, or element (b, i, j) at b * bias_stride[0] + i * bias_stride[1] + j * bias_stride[2]
  Dtype bias_dtype;  // f32 or dtype
  int64_t bias_stride[3];
  const int64_t* ranks;  // null: 0, d, 2d, ...; else k positions below k * dilation, on the call's device

  int64_t* idx;  // (B, N, k)
  void* dist;  // null, or (B, N, k) of float (double for f64)
};

}  // namespace fer
