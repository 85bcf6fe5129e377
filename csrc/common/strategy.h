// How a denoising step chooses, by the names that reveal/api.py lists.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace simsd {

constexpr int MAX_BLOCK_LENGTH = 64;  // a set of positions is 64 bits

enum class Strategy : int32_t { sequential, low_confidence_static, low_confidence_dynamic, entropy_bounded };

inline Strategy parse_strategy(const char* op, const std::string& name) {
    if (name == "sequential") return Strategy::sequential;
    if (name == "low_confidence_static") return Strategy::low_confidence_static;
    if (name == "low_confidence_dynamic") return Strategy::low_confidence_dynamic;
    if (name == "entropy_bounded") return Strategy::entropy_bounded;
    throw std::runtime_error(std::string(op) +
                             ": strategy must be one of sequential, low_confidence_static, low_confidence_dynamic, "
                             "entropy_bounded, got '" +
                             name + "'");
}

}  // namespace simsd
