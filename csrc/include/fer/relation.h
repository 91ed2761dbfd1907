// One call of the relation operator as its compiled backends see it: raw pointers, no torch.
// fer_kernels/relation/op.py states the contract, fer_kernels/relation/reference.py is the specification.
#pragma once
#include <cstdint>

#include "fer/dtype.h"

namespace fer {

enum class RelationMode : int { mr, rmr, rsum };  // the numbers of MODES in reference.py

// Every tensor is contiguous. p, q and a are null in mode mr, whose `heads` is 1 and `width` 0.
struct RelationCall {
  int64_t batch, queries, keys, channels;  // B, N, M, C
  int64_t heads, width;                    // H and R / H
  int k;
  Dtype dtype;
  RelationMode mode;
  double negative_slope;

  const int64_t* idx;  // (B, N, k)
  const void* x;       // (B, N, C)
  const void* y;       // (B, M, C); x itself where the keys are the centres
  const void* p;       // (B, N, H * width)
  const void* q;       // (B, M, H * width)
  const void* a;       // (H, width)
};

struct RelationForward : RelationCall {
  void* out;       // (B, N, C)
  void* weights;   // null, or (B, N, k, H)
  uint8_t* slots;  // null, or (B, N, C): where each maximum came from; never in mode rsum
};

struct RelationBackward : RelationCall {
  bool own_keys;       // the keys are the centres: dx takes what would be dy
  bool need_nodes;     // dx, dy
  bool need_relation;  // dp, dq, da; without it x and y are null

  const void* grad;          // (B, N, C)
  const void* grad_weights;  // null, or (B, N, k, H)
  const uint8_t* slots;      // (B, N, C); null in mode rsum
  const int32_t* reverse;    // (B, M + 1 + N * k): offsets, then edges i * k + slot by key, ascending; the CPU has null

  void* dx;  // (B, N, C)
  void* dy;  // (B, M, C); null with own_keys
  void *dp, *dq, *da;
};

}  // namespace fer
