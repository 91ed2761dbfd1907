// csrc/cuda/knn.cu on the host, as a function of plain pointers for ctypes.
// Every array is copied to fenced memory first, so that an access past either end is an error, and
// the outputs start as nonsense.
#include "knn.cu"  // with the emulator's headers in place of CUDA's

#include <memory>

namespace {

using fer_emulator::Fenced;

// A copy that starts `shift` bytes past a multiple of 16, or null for null.
std::unique_ptr<Fenced> fenced(const void* data, int64_t bytes, int64_t shift = 0) {
  if (!data) return nullptr;
  auto copy = std::make_unique<Fenced>(bytes + shift, shift ? 16 : 1);
  std::memcpy(copy->data() + shift, data, bytes);
  return copy;
}

unsigned char* start(const std::unique_ptr<Fenced>& memory, int64_t shift = 0) {
  return memory ? memory->data() + shift : nullptr;
}

int64_t element_bytes(fer::Dtype dtype) { return dtype == fer::Dtype::f32 ? 4 : 2; }

}  // namespace

extern "C" int knn_emulated(const int64_t* shape, int k, int dilation, int dtype, int normalize, int allow_tf32,
                            const void* x, const void* y, const void* bias, int bias_dtype, int64_t bias_elements,
                            const int64_t* bias_stride, const int64_t* ranks, int64_t* idx, float* dist,
                            uint64_t seed, int64_t shift, char* message, int64_t message_bytes) {
  fer::KnnCall call = {};
  call.batch = shape[0];
  call.queries = shape[1];
  call.keys = shape[2];
  call.channels = shape[3];
  call.k = k;
  call.dilation = dilation;
  call.dtype = static_cast<fer::Dtype>(dtype);
  call.normalize = normalize;
  call.allow_tf32 = allow_tf32;
  call.bias_dtype = static_cast<fer::Dtype>(bias_dtype);
  std::copy(bias_stride, bias_stride + 3, call.bias_stride);

  const int64_t row_bytes = call.channels * element_bytes(call.dtype);
  const int64_t outputs = call.batch * call.queries * k;
  const auto own_x = fenced(x, call.batch * call.queries * row_bytes, shift);
  const auto own_y = fenced(y, call.batch * call.keys * row_bytes, shift);
  const auto own_bias = fenced(bias, bias_elements * element_bytes(call.bias_dtype));
  const auto own_ranks = fenced(ranks, k * 8);
  const auto own_idx = fenced(idx, outputs * 8);
  const auto own_dist = fenced(dist, outputs * 4);
  call.x = start(own_x, shift);
  call.y = start(own_y, shift);
  call.bias = start(own_bias);
  call.ranks = reinterpret_cast<const int64_t*>(start(own_ranks));
  call.idx = reinterpret_cast<int64_t*>(start(own_idx));
  call.dist = start(own_dist);
  std::memset(call.idx, 0xA5, outputs * 8);
  if (call.dist) std::memset(call.dist, 0xA5, outputs * 4);
  const Fenced workspace(fer::cuda::knn_workspace_bytes(call));
  std::memset(workspace.data(), 0xFF, fer::cuda::knn_workspace_bytes(call));

  fer_emulator::seed(seed);
  fer_emulator::machine.error.clear();
  const cudaError_t error = fer::cuda::knn(call, workspace.data(), nullptr);
  std::memcpy(idx, call.idx, outputs * 8);
  if (dist) std::memcpy(dist, call.dist, outputs * 4);
  std::snprintf(message, message_bytes, "%s", fer_emulator::error().c_str());
  return error;
}
