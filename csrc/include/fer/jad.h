// One call of the jad operator as its compiled backends see it: raw pointers, no torch.
// fer_kernels/jad/op.py states the contract, fer_kernels/jad/reference.py is the specification.
#pragma once
#include <cstdint>

#include "fer/dtype.h"

namespace fer {

enum class JadMode : int { none, key, soft, entry, random, dropkey };  // the numbers of MODES in reference.py

constexpr double kNearlyUniform = 0.05;  // a head whose M * std(c) is below this drops nothing
constexpr double kLostMass = 1e-6;       // entry: a row that would keep less is left whole

// Every tensor is contiguous. "Accumulation type" is float, or double for f64.
struct JadCall {
  int64_t batch, heads, queries, keys, width;  // B, H, N, M, D
  Dtype dtype;
  double scale;
  const void* q;  // (B, H, N, D)
  const void* k;  // (B, H, M, D)
  const void* v;  // (B, H, M, D); null where only column means are asked for
};

struct JadForward : JadCall {
  JadMode mode;
  double beta, max_drop, soft, tau;
  int64_t protect;
  bool joint_over_head;
  const bool* gate;     // null, or (B, H)
  const double* noise;  // null, or (B, H, M)

  void* out;          // (B, H, N, D); null where only column means are asked for
  void* lse;          // (B, H, N), accumulation type
  void* column_mean;  // null, or (B, H, M), accumulation type
  void* bias;         // (B, H, M), accumulation type; null in modes none and entry
  uint8_t* bits;      // null, or (B, H, N, ceil(M / 8)) in mode entry
};

struct JadBackward : JadCall {
  const void* grad;        // (B, H, N, D); null for the gradient of the column means
  const void* grad_means;  // (B, H, M), accumulation type; null for that of attention
  const void* lse;         // (B, H, N); the CPU does without
  const void* bias;        // null, or (B, H, M)
  const uint8_t* bits;     // null, or (B, H, N, ceil(M / 8))
  void *dq, *dk, *dv;      // dv null where v is
};

}  // namespace fer
