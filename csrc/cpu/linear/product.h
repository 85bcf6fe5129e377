// Products y = x W^T of thin_linear and grouped_linear: what is read how, and the work's partition over threads. The
// arithmetic is in kernel.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "common/element.h"
#include "cpu/capability.h"
#include "cpu/linear/problem.h"

namespace simsd::linear {
namespace {

constexpr int64_t MAX_PANEL = 32;     // weight rows that a thread takes at a time: they stay in its cache
constexpr double SERIAL_FLOPS = 1e6;  // below this, waking threads costs more than it saves

const Kernels& kernels() {
    switch (capability()) {
#if defined(__x86_64__)
        case Capability::avx512:
            return avx512_kernels();
        case Capability::avx2:
            return avx2_kernels();
#endif
        default:
            return portable_kernels();
    }
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::unique_ptr<float[]> uninitialised(int64_t floats) { return std::unique_ptr<float[]>(new float[floats]); }

// A weight's rows of K elements, read as float32: in place where that is what they are, else from a converted copy;
// or in place as int8.
struct Weight {
    const void* data;
    int64_t row_stride, stride, k;
    Element element;

    bool in_place() const { return element == Element::float32 && (stride == 1 || k <= 1); }
    bool is_int8() const { return element == Element::int8 && (stride == 1 || k <= 1); }

    // Points `pointers` at `count` rows of K elements, the first `offset` elements behind `data`; `memory` (count * K
    // floats) takes copies where there must be.
    void read(const Kernels& kernels, int64_t offset, int64_t count, float* memory, const float** pointers) const {
        for (int64_t i = 0; i < count; ++i, offset += row_stride) {
            if (in_place()) {
                pointers[i] = static_cast<const float*>(data) + offset;
            } else {
                kernels.convert(element, data, offset, stride, k, memory + i * k);
                pointers[i] = memory + i * k;
            }
        }
    }
};

// x [M, K] in float32 and contiguous, converted where it is not so already.
class Input {
  public:
    Input(const Kernels& kernels, const Tensor& x) : contiguous_(x.is_contiguous() ? x : torch::stable::contiguous(x)) {
        const Element element = element_of<Element>(x);
        const void* given = contiguous_.const_data_ptr();
        data_ = static_cast<const float*>(given);
        if (element == Element::float32) return;
        memory_ = uninitialised(x.numel());
        kernels.convert(element, given, 0, 1, x.numel(), memory_.get());
        data_ = memory_.get();
    }

    const float* data() const { return data_; }
    Element element() const { return element_of<Element>(contiguous_); }

  private:
    Tensor contiguous_;
    std::unique_ptr<float[]> memory_;
    const float* data_;
};

Element weight_element(const Tensor& weight) {
    return weight.scalar_type() == ScalarType::Char ? Element::int8 : element_of<Element>(weight);
}

// What an int8 weight's products are multiplied by.
struct Scale {
    const void* data = nullptr;  // where there is none
    int64_t stride = 0;
    Element element = Element::float32;
};

// `scale`: [..., N].
Scale scale_of(const std::optional<Tensor>& scale) {
    if (!scale) return {};
    return {scale->const_data_ptr(), scale->stride(scale->dim() - 1), element_of<Element>(*scale)};
}

// Rows row .. row + rows of x, times the [N, K] `offset` elements behind the weight's data, whose scale [N] is
// `scale_offset` elements behind the scale's.
struct Group {
    int64_t row, rows, offset, scale_offset;
};

struct Problem {
    const Kernels& kernels;
    Weight weight;
    Scale scale;
    const float* x;   // [M, K], contiguous
    void* out;        // [M, N], contiguous
    Element element;  // of `out`
    int64_t columns;
};

// out[row .. row + count][column .. column + width] from float32 [count, kernels.columns], times `scale` [width] where
// there is one.
void store_tile(const Problem& p, int64_t row, int64_t count, int64_t column, int64_t width, const float* tile,
                const float* scale) {
    const auto store = [&](auto* out) {
        for (int64_t r = 0; r < count; ++r) {
            for (int64_t c = 0; c < width; ++c) {
                const float sum = tile[r * p.kernels.columns + c];
                out[(row + r) * p.columns + column + c] = scale ? sum * scale[c] : sum;
            }
        }
    };
    switch (p.element) {
        case Element::float32:
            return store(static_cast<float*>(p.out));
        case Element::bfloat16:
            return store(static_cast<torch::headeronly::BFloat16*>(p.out));
        default:
            return store(static_cast<torch::headeronly::Half*>(p.out));
    }
}

// A group's outputs of its weight's rows first .. first + width. x's rows are cut into blocks of nearly equal size.
void multiply_panel(const Problem& p, const Group& group, int64_t first, int64_t width, float* memory) {
    const int64_t k = p.weight.k, step = p.kernels.columns;
    const int64_t offset = group.offset + first * p.weight.row_stride;
    // The same bits, with int8 read from memory and no copy of it.
    const bool in_registers = p.weight.is_int8() && group.rows <= p.kernels.int8_rows;
    const float* weight[MAX_PANEL];
    const int8_t* weight_int8[MAX_PANEL];
    if (in_registers) {
        const int8_t* data = static_cast<const int8_t*>(p.weight.data) + offset;
        for (int64_t c = 0; c < width; ++c) weight_int8[c] = data + c * p.weight.row_stride;
    } else {
        p.weight.read(p.kernels, offset, width, memory, weight);
    }
    // The last tile is filled up with a repeated row, whose outputs are dropped.
    for (int64_t c = width; c % step != 0; ++c) {
        weight[c] = weight[width - 1];
        weight_int8[c] = weight_int8[width - 1];
    }
    float scales[MAX_PANEL];
    if (p.scale.data) {
        const int64_t from = group.scale_offset + first * p.scale.stride;
        p.kernels.convert(p.scale.element, p.scale.data, from, p.scale.stride, width, scales);
    }
    const int64_t blocks = divide_up(group.rows, p.kernels.rows);
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = block * group.rows / blocks, count = (block + 1) * group.rows / blocks - begin;
        const int64_t row = group.row + begin;
        for (int64_t c = 0; c < width; c += step) {
            const int64_t column = first + c;
            if (p.weight.element == Element::float32 && c + step <= width) {
                float* out = static_cast<float*>(p.out) + row * p.columns + column;
                p.kernels.multiply(count, p.x + row * k, weight + c, k, out, p.columns);
            } else {
                float tile[MAX_TILE];
                if (in_registers) {
                    p.kernels.multiply_int8(count, p.x + row * k, weight_int8 + c, k, tile, step);
                } else {
                    p.kernels.multiply(count, p.x + row * k, weight + c, k, tile, step);
                }
                store_tile(p, row, count, column, std::min(step, width - c), tile, p.scale.data ? scales + c : nullptr);
            }
        }
    }
}

// Every group has rows. Threads take panels of columns, each of all groups, so that groups of any size balance.
void multiply(const Problem& p, const Group* groups, int64_t count) {
    int64_t rows = 0;
    for (int64_t g = 0; g < count; ++g) rows += groups[g].rows;
    const double flops = 2.0 * rows * p.columns * p.weight.k;
    const int64_t threads = flops < SERIAL_FLOPS ? 1 : torch::stable::get_num_threads();
    const int64_t step = p.kernels.columns;
    const int64_t panel = std::min(MAX_PANEL, divide_up(divide_up(p.columns, 4 * threads), step) * step);
    const int64_t panels = divide_up(p.columns, panel);
    const auto work = [&](int64_t begin, int64_t end) {
        const auto memory = uninitialised(p.weight.in_place() ? 0 : panel * p.weight.k);
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = i / count * panel;
            multiply_panel(p, groups[i % count], first, std::min(panel, p.columns - first), memory.get());
        }
    };
    if (threads == 1) {
        work(0, panels * count);
    } else {
        torch::stable::parallel_for(0, panels * count, 1, work);
    }
}

}  // namespace
}  // namespace simsd::linear
