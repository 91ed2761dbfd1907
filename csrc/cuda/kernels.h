// What csrc/bindings/cuda.cpp calls: launchers that only enqueue work on `stream`.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>

#include "fer/knn.h"

namespace fer::cuda {

// Bytes of device scratch that knn() wants for this call.
size_t knn_workspace_bytes(const KnnCall& call);
cudaError_t knn(const KnnCall& call, void* workspace, cudaStream_t stream);

}  // namespace fer::cuda
