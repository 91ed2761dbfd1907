// What csrc/bindings/cpu.cpp calls. Each kernel file is compiled once for every instruction set,
// into the namespace of that name; the binding picks one at run time.
#pragma once
#include <cstdint>

#include "fer/knn.h"
#include "fer/relation.h"

namespace fer::cpu {

#define FER_DECLARE_KERNELS(isa)                                              \
  namespace isa {                                                             \
  /* Rows [begin, end) of the B * N queries. */                               \
  void knn(const KnnCall& call, int64_t begin, int64_t end);                  \
  /* Units [begin, end) of relation_units(). */                               \
  void relation(const RelationForward& call, int64_t begin, int64_t end);     \
  /* Units [begin, end) of relation_backward_units(); sums of da by unit. */  \
  void relation_backward(const RelationBackward& call, void* da_parts, int64_t begin, int64_t end); \
  }

FER_DECLARE_KERNELS(baseline)
#if defined(__x86_64__)
FER_DECLARE_KERNELS(avx2)
FER_DECLARE_KERNELS(avx512)
#endif
#undef FER_DECLARE_KERNELS

}  // namespace fer::cpu
