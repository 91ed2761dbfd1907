// csrc/cuda/relation.cu on the host, as functions of plain pointers for ctypes.
// Every array is copied to fenced memory and back, so that an access past either end is an error, and
// the outputs and the workspace start as nonsense.
#include "relation.cu"  // with the emulator's headers in place of CUDA's

#include <deque>

namespace {

using fer_emulator::Fenced;

// Fenced twins of a call's arrays: `shift` bytes past a multiple of 16, but for those of integers.
class Arrays {
 public:
  explicit Arrays(int64_t shift) : shift_(shift) {}

  template <class T>
  T* input(T* data, int64_t bytes) {
    return take(data, bytes, sizeof(T) == 1 ? shift_ : 0);
  }
  template <class T>
  T* output(T* data, int64_t bytes) {
    T* twin = take(data, bytes, sizeof(T) == 1 ? shift_ : 0);
    if (twin) {
      std::memset(twin, 0xA5, bytes);
      outputs_.push_back({data, twin, static_cast<size_t>(bytes)});
    }
    return twin;
  }
  void copy_back() const {
    for (const Output& output : outputs_) std::memcpy(output.target, output.source, output.bytes);
  }

 private:
  struct Output {
    void* target;
    const void* source;
    size_t bytes;
  };

  template <class T>
  T* take(T* data, int64_t bytes, int64_t shift) {
    if (!data) return nullptr;
    unsigned char* twin = memory_.emplace_back(bytes + shift, 16).data() + shift;
    std::memcpy(twin, data, bytes);
    return reinterpret_cast<T*>(twin);
  }

  int64_t shift_;
  std::deque<Fenced> memory_;
  std::vector<Output> outputs_;
};

int64_t element_bytes(const fer::RelationCall& call) { return call.dtype == fer::Dtype::f32 ? 4 : 2; }

struct Bytes {
  int64_t centres, keys, p, q, a, weights;
  explicit Bytes(const fer::RelationCall& call) {
    const int64_t element = element_bytes(call);
    centres = call.batch * call.queries * call.channels * element;
    keys = call.batch * call.keys * call.channels * element;
    a = call.heads * call.width * element;
    p = call.batch * call.queries * a;
    q = call.batch * call.keys * a;
    weights = call.batch * call.queries * call.k * call.heads * element;
  }
};

// Makes the call's arrays fenced ones.
void fence_inputs(Arrays& arrays, fer::RelationCall& call) {
  const Bytes bytes(call);
  const bool own = call.y == call.x;
  call.idx = arrays.input(call.idx, call.batch * call.queries * call.k * 8);
  call.x = arrays.input(static_cast<const unsigned char*>(call.x), bytes.centres);
  call.y = own ? call.x : arrays.input(static_cast<const unsigned char*>(call.y), bytes.keys);
  call.p = arrays.input(static_cast<const unsigned char*>(call.p), bytes.p);
  call.q = arrays.input(static_cast<const unsigned char*>(call.q), bytes.q);
  call.a = arrays.input(static_cast<const unsigned char*>(call.a), bytes.a);
}

void* output(Arrays& arrays, void* data, int64_t bytes) {
  return arrays.output(static_cast<unsigned char*>(data), bytes);
}

int finish(cudaError_t error, char* message, int64_t message_bytes) {
  std::snprintf(message, message_bytes, "%s", fer_emulator::error().c_str());
  return error;
}

void begin(uint64_t seed) {
  fer_emulator::seed(seed);
  fer_emulator::machine.error.clear();
}

}  // namespace

extern "C" int relation_emulated(fer::RelationForward* given, uint64_t seed, int64_t shift, char* message,
                                 int64_t message_bytes) {
  fer::RelationForward call = *given;
  const Bytes bytes(call);
  Arrays arrays(shift);
  fence_inputs(arrays, call);
  call.out = output(arrays, call.out, bytes.centres);
  call.weights = output(arrays, call.weights, bytes.weights);
  call.slots = arrays.output(call.slots, call.batch * call.queries * call.channels);
  begin(seed);
  const cudaError_t error = fer::cuda::relation(call, nullptr);
  arrays.copy_back();
  return finish(error, message, message_bytes);
}

extern "C" int relation_backward_emulated(fer::RelationBackward* given, uint64_t seed, int64_t shift, char* message,
                                          int64_t message_bytes) {
  fer::RelationBackward call = *given;
  const Bytes bytes(call);
  Arrays arrays(shift);
  fence_inputs(arrays, call);
  call.grad = arrays.input(static_cast<const unsigned char*>(call.grad), bytes.centres);
  call.grad_weights = arrays.input(static_cast<const unsigned char*>(call.grad_weights), bytes.weights);
  call.slots = arrays.input(call.slots, call.batch * call.queries * call.channels);
  call.reverse = arrays.input(call.reverse, call.batch * (call.keys + 1 + call.queries * call.k) * 4);
  call.dx = output(arrays, call.dx, bytes.centres);
  call.dy = output(arrays, call.dy, bytes.keys);
  call.dp = output(arrays, call.dp, bytes.p);
  call.dq = output(arrays, call.dq, bytes.q);
  call.da = output(arrays, call.da, bytes.a);
  const size_t workspace_bytes = fer::cuda::relation_backward_workspace_bytes(call);
  const Fenced workspace(workspace_bytes, 16);
  std::memset(workspace.data(), 0xFF, workspace_bytes);
  begin(seed);
  const cudaError_t error = fer::cuda::relation_backward(call, workspace.data(), nullptr);
  arrays.copy_back();
  return finish(error, message, message_bytes);
}

extern "C" int relation_reverse_emulated(const int64_t* idx, int64_t batch, int64_t queries, int64_t keys, int k,
                                         int32_t* reverse, uint64_t seed, char* message, int64_t message_bytes) {
  Arrays arrays(0);
  const int64_t edges = queries * k;
  const int64_t* own_idx = arrays.input(idx, batch * edges * 8);
  int32_t* own_reverse = arrays.output(reverse, batch * (keys + 1 + edges) * 4);
  begin(seed);
  const cudaError_t error = fer::cuda::relation_reverse(own_idx, batch, queries, keys, k, own_reverse, nullptr);
  arrays.copy_back();
  return finish(error, message, message_bytes);
}
