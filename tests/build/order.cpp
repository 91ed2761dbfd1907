// Hands the shared order of distances to the test as plain C functions.
#include "fer/order.h"

extern "C" {
uint32_t key(float value) { return fer::ordered_key(value); }
float value(uint32_t key) { return fer::key_value(key); }
uint64_t packed(float value, uint32_t index) { return fer::packed_key(value, index); }
uint32_t packed_index(uint64_t packed) { return fer::packed_index(packed); }
float packed_value(uint64_t packed) { return fer::packed_value(packed); }
}
