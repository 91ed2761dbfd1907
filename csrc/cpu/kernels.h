// What csrc/bindings/cpu.cpp calls. Each kernel file is compiled once for every instruction set,
// into the namespace of that name; the binding picks one at run time.
#pragma once
#include <cstdint>

#include "fer/jad.h"
#include "fer/knn.h"
#include "fer/linear.h"
#include "fer/norm.h"
#include "fer/relation.h"

namespace fer::cpu {

// Once for every instruction set, and once more for tiles of bfloat16, and for vectors of it.
#define FER_DECLARE_LINEAR                                                                            \
  /* The weight packed for y or (transposed) for dx: in how many units, how many bytes, units [begin, end). */ \
  int64_t linear_units(const LinearCall& call, bool transposed);                                      \
  int64_t linear_packed(const LinearCall& call, bool transposed);                                     \
  void linear_pack(const LinearCall& call, bool transposed, void* packed, int64_t begin, int64_t end); \
  /* Rows [begin, end) of y, and of dx and dm; begin is a multiple of linear_chunk(). Where statistics are */ \
  /* wanted or there is a norm, also their parts, 2 * channels numbers a chunk. */                    \
  int64_t linear_chunk();                                                                             \
  void linear(const LinearForward& call, const void* packed, int64_t begin, int64_t end);             \
  void linear_input_gradient(const LinearBackward& call, const void* packed, int64_t begin, int64_t end); \
  /* dweight: all parts, each of linear_part_size(call) numbers and made in linear_part_units(call) units, of */ \
  /* which [begin, end); then rows from all parts. */                                                 \
  int64_t linear_parts(const LinearCall& call);                                                       \
  int64_t linear_part_size(const LinearCall& call);                                                   \
  int64_t linear_part_units(const LinearCall& call);                                                  \
  void linear_weight_parts(const LinearBackward& call, float* parts, int64_t begin, int64_t end);     \
  void linear_weight_merge(const LinearBackward& call, const float* parts, int64_t begin, int64_t end);

// Of all but tiles of bfloat16. From all parts: y's statistics, and the gradients of x's norm.
#define FER_DECLARE_NORMED                                                                            \
  void linear_merge_stats(const LinearForward& call);                                                 \
  void linear_merge_gradients(const LinearBackward& call, int64_t chunks);

#define FER_DECLARE_KERNELS(isa)                                                                      \
  namespace isa {                                                                                     \
  /* Rows [begin, end) of the B * N queries. */                                                       \
  void knn(const KnnCall& call, int64_t begin, int64_t end);                                          \
  /* Least and largest of `count` indices; INT64_MAX and INT64_MIN of none. */                        \
  void index_bounds(const int64_t* idx, int64_t count, int64_t* low, int64_t* high);                  \
  /* Units [begin, end) of relation_units(call). */                                                   \
  int64_t relation_units(const RelationForward& call);                                                \
  void relation(const RelationForward& call, int64_t begin, int64_t end);                             \
  /* Units [begin, end); da_parts takes R / H numbers of every unit, to be summed once all are done. */ \
  int64_t relation_backward_units(const RelationBackward& call);                                      \
  void relation_backward(const RelationBackward& call, double* da_parts, int64_t begin, int64_t end); \
  void relation_sum_parts(const RelationBackward& call, const double* da_parts);                      \
  /* jad where jad_keeps_powers(call): heads [begin, end) of the B * H. means is (B, H, M). */        \
  bool jad_keeps_powers(const JadForward& call);                                                      \
  bool jad_wants_means(const JadForward& call);                                                       \
  void jad_heads(const JadForward& call, void* means, int64_t begin, int64_t end);                    \
  /* Otherwise, one after the other, in units of jad_chunks(call) a head: the means' parts, M a unit, */ \
  /* where they are wanted; means and bias from them, or from null; the outputs. */                   \
  int64_t jad_chunks(const JadForward& call);                                                         \
  void jad_means(const JadForward& call, double* parts, int64_t begin, int64_t end);                  \
  void jad_choose(const JadForward& call, const double* parts, void* means);                          \
  void jad_outputs(const JadForward& call, const void* means, int64_t begin, int64_t end);            \
  void jad_backward(const JadBackward& call, int64_t begin, int64_t end);                             \
  /* norm, one after the other: the parts of chunks [begin, end) of call.chunks(), 2 * C numbers a chunk; */ \
  /* the statistics from all parts; y of chunks. Backward likewise: parts, weight and bias, dx. */    \
  void norm_stats(const NormForward& call, double* parts, int64_t begin, int64_t end);                \
  void norm_merge(const NormForward& call, const double* parts);                                      \
  void norm_apply(const NormForward& call, int64_t begin, int64_t end);                               \
  void norm_backward_sums(const NormBackward& call, double* parts, int64_t begin, int64_t end);       \
  void norm_backward_merge(const NormBackward& call, const double* parts);                            \
  void norm_backward_apply(const NormBackward& call, int64_t begin, int64_t end);                     \
  FER_DECLARE_LINEAR                                                                                  \
  FER_DECLARE_NORMED                                                                                  \
  }

FER_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
FER_DECLARE_KERNELS(avx2)
FER_DECLARE_KERNELS(avx512)
// Products of bfloat16, for calls of that dtype; all others are of float32.
namespace avx512bf16 {
FER_DECLARE_LINEAR
FER_DECLARE_NORMED
}  // namespace avx512bf16
#endif
#undef FER_DECLARE_KERNELS

#if defined(__x86_64__) && defined(__linux__)
#define FER_TILES  // linear_tiles.cpp is compiled
namespace tiles {
// Whether this processor multiplies tiles of bfloat16, and the kernel lets this process do so.
bool available();
FER_DECLARE_LINEAR
}  // namespace tiles
#endif
#undef FER_DECLARE_LINEAR
#undef FER_DECLARE_NORMED

}  // namespace fer::cpu
