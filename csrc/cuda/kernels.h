// What csrc/bindings/cuda.cpp calls: launchers that only enqueue work on `stream`.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>

#include "fer/knn.h"
#include "fer/relation.h"

namespace fer::cuda {

// Bytes of device scratch that knn() wants for this call.
size_t knn_workspace_bytes(const KnnCall& call);
cudaError_t knn(const KnnCall& call, void* workspace, cudaStream_t stream);

cudaError_t relation(const RelationForward& call, cudaStream_t stream);
size_t relation_backward_workspace_bytes(const RelationBackward& call);
cudaError_t relation_backward(const RelationBackward& call, void* workspace, cudaStream_t stream);
// reverse (B, keys + 1 + queries * k) of idx (B, queries, k), as RelationBackward takes it.
size_t relation_reverse_workspace_bytes(int64_t batch, int64_t queries, int64_t keys, int k);
cudaError_t relation_reverse(const int64_t* idx, int64_t batch, int64_t queries, int64_t keys, int k,
                             int32_t* reverse, void* workspace, cudaStream_t stream);

}  // namespace fer::cuda
