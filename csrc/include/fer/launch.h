// Starting a kernel, and the dynamic shared memory inside it, alike under nvcc and under the
// host emulator of tests/build (FER_EMULATED_CUDA), which runs the same kernels without a GPU.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#if defined(FER_EMULATED_CUDA)
#define FER_DYNAMIC_SHARED(name) unsigned char* const name = fer_emulator::dynamic_shared()
#else
#define FER_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#endif

namespace fer {

// Enqueues `blocks` blocks of `threads` threads. The answer is this launch's own error: an older
// one that another library left behind is neither reported nor cleared.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
                   [[maybe_unused]] cudaStream_t stream, Arguments... arguments) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
#if defined(FER_EMULATED_CUDA)
  return fer_emulator::launch(static_cast<unsigned>(blocks), static_cast<unsigned>(threads), shared_bytes,
                              [=] { kernel(arguments...); });
#else
  if (shared_bytes > 48 * 1024) {  // more than every kernel may have unasked
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
#endif
}

}  // namespace fer
