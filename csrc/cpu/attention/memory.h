// Scratch memory of the attention ops, and typed access to tensors of any element.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <memory>

#include "cpu/attention/problem.h"

namespace simsd::attention {

constexpr int64_t ALIGNMENT = 16;  // floats: one cache line

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t aligned(int64_t floats) { return divide_up(floats, ALIGNMENT) * ALIGNMENT; }

class Memory {
  public:
    // At least `floats` floats, with unspecified contents, valid until the next call.
    float* reserve(int64_t floats) {
        if (floats > size_) {
            data_.reset(new float[floats + ALIGNMENT]);
            size_ = floats;
        }
        const auto address = reinterpret_cast<uintptr_t>(data_.get());
        constexpr uintptr_t bytes = ALIGNMENT * sizeof(float);
        return reinterpret_cast<float*>((address + bytes - 1) / bytes * bytes);
    }

  private:
    std::unique_ptr<float[]> data_;
    int64_t size_ = 0;
};

// work(element{}) with an element of the type that the tensors have.
template <typename Work>
void with_element(Element element, const Work& work) {
    switch (element) {
        case Element::float32:
            return work(float{});
        case Element::bfloat16:
            return work(torch::headeronly::BFloat16{});
        case Element::float16:
            return work(torch::headeronly::Half{});
    }
}

}  // namespace simsd::attention
