// Runs CUDA kernels on the host, so that their logic is tested where there is no GPU.
//
// A block's threads are fibers that take turns; a turn ends where a thread waits for others: at a
// barrier or at an exchange within its warp. Blocks run one after another. What the kernels use of
// CUDA is here and no more. On purpose it is unkind, within what CUDA allows:
//
//   - turns go round in an order shuffled by a seed, so a missing barrier shows;
//   - shared memory starts as NaN and ends at a page that faults;
//   - an asynchronous copy lands at once or as late as its wait, by the seed;
//   - a barrier that some threads never reach, or lanes that meet in different exchanges, is an error.
//
// Compile with -fsanitize=undefined -fsanitize-undefined-trap-on-error: vector accesses that are not
// aligned trap then, and the trap becomes the launch's error like a fault does.
#pragma once
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct uint3 {
  unsigned x, y, z;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorUnknown = 999,
};
using cudaStream_t = struct CUstream_st*;

inline uint3 threadIdx, blockIdx, blockDim;
using std::max;
using std::min;

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  float size = exponent == 0    ? std::ldexp(float(fraction), -24)
               : exponent == 31 ? (fraction ? NAN : INFINITY)
                                : std::ldexp(float(fraction + 1024), exponent - 25);
  return value.bits >> 15 ? -size : size;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (value != value) return {0x7FFF};
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (value != value) return {0x7FFF};
  const float size = std::fabs(value);
  if (size >= 65520) return {uint16_t(sign | 0x7C00)};
  int exponent;
  std::frexp(std::max(size, 0x1p-14f), &exponent);  // below the least normal number the step stays
  const auto steps = unsigned(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return {uint16_t(sign | (((exponent + 13) << 10) + steps))};  // a carry goes where it belongs
}

namespace fer_emulator {

// Memory with a page before and after it that faults. It ends at its end, up to `alignment`.
class Fenced {
 public:
  explicit Fenced(size_t bytes, size_t alignment = 1) {
    const size_t page = sysconf(_SC_PAGESIZE), room = (bytes + alignment + page - 1) / page * page;
    mapped_ = room + 2 * page;
    base_ = static_cast<unsigned char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(base_ + page, room, PROT_READ | PROT_WRITE);
    data_ = base_ + page + (room - bytes) / alignment * alignment;
  }
  Fenced(const Fenced&) = delete;
  ~Fenced() { munmap(base_, mapped_); }
  unsigned char* data() const { return data_; }

 private:
  unsigned char *base_, *data_;
  size_t mapped_;
};

struct Copy {
  void* target;
  const void* source;
};

struct Fiber {
  static constexpr size_t kStackBytes = 64 * 1024;
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  const char* waits_for = nullptr;  // null: it can go on
  bool done = false;
  std::vector<Copy> copies;  // issued, not landed
};

struct Warp {
  int arrived = 0;
  unsigned meeting = 0;
  const char* purpose = nullptr;
  alignas(16) unsigned char slots[2][32][48];  // by turns: a lane may be one meeting ahead of a reader
};

struct Machine {
  std::mt19937_64 random;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  unsigned threads = 0, at_barrier = 0, current = 0;
  unsigned char* shared = nullptr;
  std::function<void()> body;
  ucontext_t scheduler;
  std::string error;
};
inline Machine machine;

inline void seed(uint64_t value) { machine.random.seed(value); }
inline const std::string& error() { return machine.error; }
inline unsigned char* dynamic_shared() { return machine.shared; }

[[noreturn]] inline void fail(const std::string& message) {
  machine.error = message + " (block " + std::to_string(blockIdx.x) + ", thread " + std::to_string(threadIdx.x) + ")";
  setcontext(&machine.scheduler);
  __builtin_unreachable();
}

inline void wait_for(const char* purpose) {
  Fiber& fiber = *machine.fibers[machine.current];
  fiber.waits_for = purpose;
  swapcontext(&fiber.context, &machine.scheduler);
}

inline void wake(unsigned first, unsigned count) {
  for (unsigned t = first; t < first + count; ++t) machine.fibers[t]->waits_for = nullptr;
}

// Meets the other lanes of the warp and shows each what all have brought.
template <class Item>
const unsigned char (*exchange(const char* purpose, const Item& item))[48] {
  static_assert(sizeof(Item) <= 48);
  Warp& warp = machine.warps[machine.current / 32];
  if (warp.arrived == 0) warp.purpose = purpose;
  if (warp.purpose != purpose) fail(std::string("a warp parts: ") + warp.purpose + " and " + purpose);
  auto* slots = warp.slots[warp.meeting % 2];
  std::memcpy(slots[machine.current % 32], &item, sizeof item);
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.meeting;
    wake(machine.current / 32 * 32, 32);
  } else {
    wait_for(purpose);
  }
  return slots;
}

template <class Item>
Item brought(const unsigned char (*slots)[48], int lane) {
  Item item;
  std::memcpy(&item, slots[lane], sizeof item);
  return item;
}

template <class Item, class Combine>
Item reduce(const char* purpose, unsigned lanes, Item mine, Combine combine) {
  if (lanes != 0xFFFFFFFFu) fail("only whole warps are emulated");
  const auto* slots = exchange(purpose, mine);
  Item all = brought<Item>(slots, 0);
  for (int lane = 1; lane < 32; ++lane) all = combine(all, brought<Item>(slots, lane));
  return all;
}

inline void run_fiber() {
  machine.body();
  Fiber& fiber = *machine.fibers[machine.current];
  if (!fiber.copies.empty()) fail("a thread ends before its asynchronous copies");
  fiber.done = true;
  setcontext(&machine.scheduler);
}

// The scheduler's context is saved at each turn's start, so a failure comes back here too.
inline void take_turn(unsigned thread) {
  machine.current = thread;
  threadIdx = {thread, 0, 0};
  Fiber& fiber = *machine.fibers[thread];
  swapcontext(&machine.scheduler, &fiber.context);
}

inline void run_block() {
  std::vector<unsigned> order(machine.threads);
  for (unsigned t = 0; t < machine.threads; ++t) {
    order[t] = t;
    Fiber& fiber = *machine.fibers[t];
    fiber.waits_for = nullptr;
    fiber.done = false;
    fiber.copies.clear();
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  machine.warps.assign((machine.threads + 31) / 32, Warp{});
  machine.at_barrier = 0;
  for (unsigned left = machine.threads; left > 0;) {
    std::shuffle(order.begin(), order.end(), machine.random);
    bool progress = false;
    for (const unsigned thread : order) {
      Fiber& fiber = *machine.fibers[thread];
      if (fiber.done || fiber.waits_for) continue;
      take_turn(thread);
      if (!machine.error.empty()) return;
      progress = true;
      left -= fiber.done;
    }
    if (!progress) {
      for (const auto& fiber : machine.fibers) {
        if (!fiber->done && fiber->waits_for) machine.error = std::string("deadlock in ") + fiber->waits_for;
      }
      return;
    }
  }
}

inline void on_signal(int signal) {
  const bool trap = signal == SIGILL || signal == SIGTRAP;
  fail(trap ? "undefined behaviour: a misaligned access or an overflow" : "access outside of memory");
}

// Signals become errors of the launch while one of these is alive.
class SignalsAsErrors {
 public:
  SignalsAsErrors() {
    struct sigaction action = {};
    action.sa_handler = on_signal;
    action.sa_flags = SA_NODEFER;
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~SignalsAsErrors() {
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &before_[i], nullptr);
  }

 private:
  static constexpr int kSignals[4] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
  struct sigaction before_[4];
};

inline cudaError_t launch(unsigned blocks, unsigned threads, size_t shared_bytes, std::function<void()> body) {
  const Fenced shared(shared_bytes, 128);
  const SignalsAsErrors signals;
  machine.error.clear();
  machine.threads = threads;
  blockDim = {threads, 1, 1};
  machine.shared = shared.data();
  machine.body = std::move(body);
  while (machine.fibers.size() < threads) machine.fibers.push_back(std::make_unique<Fiber>());
  std::vector<unsigned> order(blocks);
  for (unsigned b = 0; b < blocks; ++b) order[b] = b;
  std::shuffle(order.begin(), order.end(), machine.random);
  for (const unsigned block : order) {
    std::memset(machine.shared, 0xFF, shared_bytes);
    blockIdx = {block, 0, 0};
    run_block();
    if (!machine.error.empty()) return cudaErrorUnknown;
  }
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------
// The instructions of fer/tensor_core.h and of the kernels themselves

inline float max_nan(float a, float b) { return a != a || b != b ? NAN : a > b ? a : b; }

inline void land(const Copy& copy) {
  if (copy.source) {
    std::memcpy(copy.target, copy.source, 16);
  } else {
    std::memset(copy.target, 0, 16);
  }
}

inline void copy_async_16(void* target, const void* source, bool present) {
  if (reinterpret_cast<uintptr_t>(target) % 16 || reinterpret_cast<uintptr_t>(source) % 16) {
    fail("an asynchronous copy that is not aligned");
  }
  const Copy copy{target, present ? source : nullptr};
  if (machine.random() % 2) {
    land(copy);
  } else {
    machine.fibers[machine.current]->copies.push_back(copy);
  }
}

inline void wait_for_copies() {
  auto& copies = machine.fibers[machine.current]->copies;
  for (const Copy& copy : copies) land(copy);
  copies.clear();
}

inline void load_matrices(uint32_t (&out)[4], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix from an address that is not aligned");
  const auto* slots = exchange("ldmatrix", row);
  const int lane = machine.current % 32;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto* source = brought<const unsigned char*>(slots, 8 * matrix + lane / 4);
    std::memcpy(&out[matrix], source + 4 * (lane % 4), 4);
  }
}

// The 4 bytes of a row that one register holds, as numbers.
template <class Operand>
struct Unpack {
  static constexpr int kCount = 1;  // TF32: the last 13 bits are not looked at
  static float at(uint32_t bits, int) {
    bits &= 0xFFFFE000u;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};
template <>
struct Unpack<__nv_bfloat16> {
  static constexpr int kCount = 2;
  static float at(uint32_t bits, int i) { return __bfloat162float({uint16_t(bits >> 16 * i)}); }
};
template <>
struct Unpack<__half> {
  static constexpr int kCount = 2;
  static float at(uint32_t bits, int i) { return __half2float({uint16_t(bits >> 16 * i)}); }
};

template <class Operand>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t* b) {
  struct Registers {
    uint32_t a[4], b[2];
  };
  const auto* slots = exchange("mma", Registers{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}});
  const int lane = machine.current % 32;
  // Register a[h + 2 u] of lane 4 r + c is word c of unit u of row 8 h + r; b[u] alike with no h.
  for (int h = 0; h < 2; ++h) {
    for (int e = 0; e < 2; ++e) {
      const int row = lane / 4, column = 2 * (lane % 4) + e;
      double total = sum[2 * h + e];
      for (int u = 0; u < 2; ++u) {
        for (int c = 0; c < 4; ++c) {
          const uint32_t left = brought<Registers>(slots, 4 * row + c).a[h + 2 * u];
          const uint32_t right = brought<Registers>(slots, 4 * column + c).b[u];
          for (int i = 0; i < Unpack<Operand>::kCount; ++i) {
            total += double(Unpack<Operand>::at(left, i)) * Unpack<Operand>::at(right, i);
          }
        }
      }
      float result = float(total);  // rounded, where the hardware cuts off
      if (std::abs(result) > std::abs(total)) result = std::nextafter(result, 0.0f);
      sum[2 * h + e] = result;
    }
  }
}

}  // namespace fer_emulator

// ---------------------------------------------------------------------------------------------
// CUDA's own functions

inline void __syncthreads() {
  using namespace fer_emulator;
  if (++machine.at_barrier == machine.threads) {
    machine.at_barrier = 0;
    wake(0, machine.threads);
  } else {
    wait_for("__syncthreads");
  }
}
inline void __syncwarp() { fer_emulator::exchange("__syncwarp", 0); }

inline int __reduce_add_sync(unsigned lanes, int value) {
  return fer_emulator::reduce("__reduce_add_sync", lanes, value, [](int a, int b) { return a + b; });
}
inline unsigned __reduce_min_sync(unsigned lanes, unsigned value) {
  return fer_emulator::reduce("__reduce_min_sync", lanes, value, [](unsigned a, unsigned b) { return min(a, b); });
}
inline unsigned __reduce_max_sync(unsigned lanes, unsigned value) {
  return fer_emulator::reduce("__reduce_max_sync", lanes, value, [](unsigned a, unsigned b) { return max(a, b); });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int distance) {
  const auto* slots = fer_emulator::exchange("__shfl_xor_sync", value);
  return fer_emulator::brought<T>(slots, int(fer_emulator::machine.current % 32) ^ distance);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  const auto* slots = fer_emulator::exchange("__shfl_up_sync", value);
  const int lane = fer_emulator::machine.current % 32;
  return fer_emulator::brought<T>(slots, lane >= distance ? lane - distance : lane);
}
inline unsigned __match_any_sync(unsigned lanes, int value) {
  if (lanes != 0xFFFFFFFFu) fer_emulator::fail("only whole warps are emulated");
  const auto* slots = fer_emulator::exchange("__match_any_sync", value);
  unsigned peers = 0;
  for (int lane = 0; lane < 32; ++lane) peers |= unsigned(fer_emulator::brought<int>(slots, lane) == value) << lane;
  return peers;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
