// The element types of the operators' tensors.
#pragma once

namespace fer {

enum class Dtype : int { f32, f64, bf16, f16 };

}  // namespace fer
