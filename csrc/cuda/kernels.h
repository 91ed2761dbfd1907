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

// Whether relation_backward() reads call.reverse, and the bytes of device scratch that it wants.
bool relation_backward_needs_reverse(const RelationBackward& call);
size_t relation_backward_workspace_bytes(const RelationBackward& call);
cudaError_t relation_backward(const RelationBackward& call, void* workspace, cudaStream_t stream);

// reverse (B, keys + 1 + queries * k) of idx (B, queries, k), as RelationBackward takes it.
cudaError_t relation_reverse(const int64_t* idx, int64_t batch, int64_t queries, int64_t keys, int k,
                             int32_t* reverse, cudaStream_t stream);

}  // namespace fer::cuda
