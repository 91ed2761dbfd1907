// The PTX that the kernels use, one small function an instruction (sm_80 and later). Under
// FER_EMULATED_CUDA each has a host twin with the same contract, in tests/build/cuda_emulator.h.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "fer/order.h"

namespace fer {

// Operand type of a product of floats: the first 19 bits of each, the rest is not looked at.
struct Tf32 {};

#if defined(FER_EMULATED_CUDA)

using fer_emulator::copy_async_16;
using fer_emulator::load_matrices;
using fer_emulator::wait_for_copies;

template <class Operand>
inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b) {
  fer_emulator::multiply_add<Operand>(sum, a, b);
}

#else

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts copying 16 bytes from global to shared memory, or where nothing is present, filling them
// with zeros without a look at `source`. Both addresses are multiples of 16.
__device__ __forceinline__ void copy_async_16(void* target, const void* source, bool present) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source),
               "r"(present ? 16 : 0)
               : "memory");
}

// Waits for this thread's own copies only: a barrier must follow before others read them.
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Four 8 x 8 matrices of 16-bit elements (8 x 4 of 32-bit ones). Lane l gives the address of row
// l % 8 of matrix l / 8, and receives from each matrix the 4 bytes at column l % 4 of row l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(row))
               : "memory");
}

// sum += a bᵀ for 16 rows a and 8 rows b of 32 bytes each. Lane l holds sum[2 h + e], the element at
// row 8 h + l / 4 and column 2 (l % 4) + e; a and b are as load_matrices leaves them.
template <class Operand>
__device__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b);

#define FER_MULTIPLY_ADD(Operand, instruction)                                                                \
  template <>                                                                                                 \
  __device__ __forceinline__ void multiply_add<Operand>(float (&sum)[4], const uint32_t (&a)[4],              \
                                                        const uint32_t* b) {                                  \
    asm("mma.sync.aligned." instruction " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"    \
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])                                              \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                                  \
  }
FER_MULTIPLY_ADD(__nv_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FER_MULTIPLY_ADD(__half, "m16n8k16.row.col.f32.f16.f16.f32")
FER_MULTIPLY_ADD(Tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FER_MULTIPLY_ADD

#endif

// Half an ulp of TF32, so that the hardware's cut after 19 bits rounds to nearest.
FER_HOST_DEVICE inline uint32_t rounded_tf32(uint32_t bits) { return bits + 0x1000u; }

// A float as the sum of two TF32 numbers, right to 22 bits: high is the first 11 bits, low the next.
// Integers up to 2048 have no low part and so stay exact.
FER_HOST_DEVICE inline void split_tf32(uint32_t bits, uint32_t& high, uint32_t& low) {
  high = rounded_tf32(bits) & 0xFFFFE000u;
  low = rounded_tf32(float_bits(bits_float(bits) - bits_float(high)));
}

}  // namespace fer
