// The CPU module: operators for torch's CPU dispatch key, and facts about the build for Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <string>
#include <vector>

#include "bindings/knn.h"
#include "bindings/relation.h"
#include "cpu/kernels.h"

namespace {

using fer::bindings::Tensor;

enum class Isa : int { baseline, avx2, avx512 };

std::vector<std::string> supported_isas() {
  std::vector<std::string> names = {"baseline"};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    names.push_back("avx2");
  if (names.size() == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    names.push_back("avx512");
#endif
  return names;
}

// supported_isas() grows in the order of Isa, so a name's position is its value.
std::atomic<Isa> current_isa{static_cast<Isa>(supported_isas().size() - 1)};

void set_isa(const std::string& name) {
  const auto names = supported_isas();
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) throw pybind11::value_error("this processor has no instruction set '" + name + "'");
  current_isa = static_cast<Isa>(found - names.begin());
}

template <class Kernel>
Kernel pick(Kernel baseline, Kernel avx2, Kernel avx512) {
  switch (current_isa.load()) {
    case Isa::avx512: return avx512;
    case Isa::avx2: return avx2;
    default: return baseline;
  }
}

#if defined(__x86_64__)
#define FER_PICK(kernel) \
  pick(&fer::cpu::baseline::kernel, &fer::cpu::avx2::kernel, &fer::cpu::avx512::kernel)
#else
#define FER_PICK(kernel) (&fer::cpu::baseline::kernel)
#endif

std::tuple<Tensor, Tensor> knn(const Tensor& x, std::optional<Tensor> y, std::optional<Tensor> bias,
                               std::optional<Tensor> ranks, int64_t k, int64_t dilation, bool normalize,
                               bool return_distance, bool allow_tf32) {
  auto [tensors, call] =
      fer::bindings::knn_call(x, y, bias, ranks, k, dilation, normalize, return_distance, allow_tf32);
  if (call.ranks) {
    bool seen[fer::kMaxNeighbours] = {};
    for (int s = 0; s < call.k; ++s) {
      const int64_t rank = call.ranks[s];
      STD_TORCH_CHECK(rank >= 0 && rank < k * dilation, "knn: ranks must lie in [0, ", k * dilation, "), got ", rank);
      STD_TORCH_CHECK(!seen[rank], "knn: ranks must not repeat, got ", rank, " twice");
      seen[rank] = true;
    }
  }
  const auto kernel = FER_PICK(knn);
  // A thread is worth waking for about a tenth of a millisecond of products.
  const int64_t grain = std::max<int64_t>(1, 4'000'000 / std::max<int64_t>(1, call.keys * (call.channels + 16)));
  const fer::KnnCall& shared = call;
  torch::stable::parallel_for(0, call.batch * call.queries, grain,
                              [&shared, kernel](int64_t begin, int64_t end) { kernel(shared, begin, end); });
  return {tensors.idx, tensors.dist};
}

STABLE_TORCH_LIBRARY_IMPL(fer_kernels, CPU, m) { m.impl("knn", TORCH_BOX(&knn)); }

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Compiled CPU operators of fer_kernels, and what they run on.";
  m.def("supported_isas", &supported_isas, "Instruction sets of this processor that kernels exist for, slowest first.");
  m.def("current_isa", [] { return supported_isas()[static_cast<int>(current_isa.load())]; });
  m.def("set_isa", &set_isa, pybind11::arg("name"));
  m.def("num_threads", [] { return torch::stable::get_num_threads(); });
}
