// What a build's machine code is for, in words.
#pragma once

#include <initializer_list>
#include <string>

namespace simsd {

// "8.0, 12.0" from nvcc's __CUDA_ARCH_LIST__, which counts in hundredths: 800, 1200.
inline std::string architectures(std::initializer_list<int> list) {
    std::string text;
    for (const int architecture : list) {
        if (!text.empty()) text += ", ";
        text += std::to_string(architecture / 100) + "." + std::to_string(architecture / 10 % 10);
    }
    return text;
}

}  // namespace simsd
