// Argument checks for ops on torch's stable ABI. Every message names the op and the argument, what was given and what
// is allowed, as simsd_kernels/validate.py does.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>

namespace simsd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws what Python sees as a RuntimeError, without the file and line that STD_TORCH_CHECK puts first.
template <typename... Parts>
void check(bool condition, const Parts&... parts) {
    if (condition) return;
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

inline std::string shape_text(const Tensor& tensor) {
    std::ostringstream text;
    text << '[';
    for (int64_t i = 0; i < tensor.dim(); ++i) text << (i ? ", " : "") << tensor.size(i);
    text << ']';
    return text.str();
}

// `expected` holds the allowed sizes, -1 for any; `letters` is the shape in words, such as "[B, Lq]".
inline void check_shape(const char* op, const char* name, const Tensor& tensor, const int64_t* expected, int64_t dims,
                        const char* letters) {
    bool fits = tensor.dim() == dims;
    for (int64_t axis = 0; fits && axis < dims; ++axis)
        fits = expected[axis] < 0 || tensor.size(axis) == expected[axis];
    if (fits) return;
    std::ostringstream wanted;
    for (int64_t axis = 0; axis < dims; ++axis) {
        wanted << (axis ? ", " : "");
        expected[axis] < 0 ? wanted << "any" : wanted << expected[axis];
    }
    check(false, op, ": ", name, " must be ", letters, " = [", wanted.str(), "], got ", shape_text(tensor));
}

inline void check_shape(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected,
                        const char* letters) {
    check_shape(op, name, tensor, expected.begin(), expected.size(), letters);
}

// The name that Python prints, such as "torch.int32".
inline std::string dtype_text(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::Bool:
            return "torch.bool";
        case ScalarType::Char:
            return "torch.int8";
        case ScalarType::Int:
            return "torch.int32";
        case ScalarType::Long:
            return "torch.int64";
        case ScalarType::Half:
            return "torch.float16";
        case ScalarType::BFloat16:
            return "torch.bfloat16";
        case ScalarType::Float:
            return "torch.float32";
        case ScalarType::Double:
            return "torch.float64";
        default:
            return torch::headeronly::toString(dtype);
    }
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor,
                        std::initializer_list<ScalarType> allowed) {
    const ScalarType given = tensor.scalar_type();
    for (ScalarType type : allowed) {
        if (type == given) return;
    }
    std::ostringstream wanted;
    for (ScalarType type : allowed) wanted << (wanted.tellp() > 0 ? " or " : "") << dtype_text(type);
    check(false, op, ": ", name, " must be ", wanted.str(), ", got ", dtype_text(given));
}

inline void check_cpu(const char* op, const char* name, const Tensor& tensor, const Tensor& /* first */) {
    check(tensor.is_cpu(), op, ": ", name, " must be on the CPU like the other tensors");
}

}  // namespace simsd
