// How a denoising step chooses, in the order of the names that reveal/api.py lists.
#pragma once

#include <cstdint>

namespace simsd {

constexpr int MAX_BLOCK_LENGTH = 64;  // a set of positions is 64 bits

enum class Strategy : int32_t { sequential, low_confidence_static, low_confidence_dynamic, entropy_bounded };

}  // namespace simsd
