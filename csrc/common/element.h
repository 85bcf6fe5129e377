// The floating dtypes that kernels take.
#pragma once

#include <initializer_list>

#include "common/check.h"

namespace simsd {

inline constexpr std::initializer_list<ScalarType> FLOATS{ScalarType::Float, ScalarType::BFloat16, ScalarType::Half};

// As an enum of the kernels' own, with enumerators float32, bfloat16 and float16. The dtype must have been checked.
template <typename Element>
Element element_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::BFloat16:
            return Element::bfloat16;
        case ScalarType::Half:
            return Element::float16;
        default:
            return Element::float32;
    }
}

}  // namespace simsd
