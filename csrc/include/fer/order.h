// The one order every backend sorts by: ascending distance, equal distances by
// ascending index, NaN behind everything else.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__) || defined(FER_EMULATED_CUDA)
#define FER_HOST_DEVICE __host__ __device__
#else
#define FER_HOST_DEVICE
#endif

namespace fer {

FER_HOST_DEVICE static inline uint32_t float_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

FER_HOST_DEVICE static inline float bits_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

constexpr uint32_t kNanKey = 0xFFFFFFFFu;

// Monotone image of a float: a < b as floats exactly when the keys compare so as
// unsigned numbers. -0 and +0 share a key, every NaN has the largest.
FER_HOST_DEVICE static inline uint32_t ordered_key(float value) {
  if (value != value) return kNanKey;
  const uint32_t bits = float_bits(value + 0.0f);  // -0 + 0 is +0
  return bits ^ ((bits >> 31) ? 0xFFFFFFFFu : 0x80000000u);
}

FER_HOST_DEVICE static inline float key_value(uint32_t key) {
  if (key == kNanKey) return bits_float(0x7FC00000u);
  return bits_float(key ^ ((key >> 31) ? 0x80000000u : 0xFFFFFFFFu));
}

// Key and index in one number: no two candidates of a row are equal, so every
// selection algorithm gives the same answer.
FER_HOST_DEVICE static inline uint64_t packed_key(float value, uint32_t index) {
  return (static_cast<uint64_t>(ordered_key(value)) << 32) | index;
}
FER_HOST_DEVICE static inline uint32_t packed_index(uint64_t packed) { return static_cast<uint32_t>(packed); }
FER_HOST_DEVICE static inline float packed_value(uint64_t packed) { return key_value(static_cast<uint32_t>(packed >> 32)); }

}  // namespace fer
