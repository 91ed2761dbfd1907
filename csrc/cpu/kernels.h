// What csrc/bindings/cpu.cpp calls. Each kernel file is compiled once for every instruction set,
// into the namespace of that name; the binding picks one at run time.
#pragma once
#include <cstdint>

#include "fer/jad.h"
#include "fer/knn.h"
#include "fer/norm.h"
#include "fer/relation.h"

namespace fer::cpu {

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
  }

FER_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
FER_DECLARE_KERNELS(avx2)
FER_DECLARE_KERNELS(avx512)
#endif
#undef FER_DECLARE_KERNELS

}  // namespace fer::cpu
