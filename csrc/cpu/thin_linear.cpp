// thin_linear: y = x W^T for x [..., K] and weight [N, K], each row's bits independent of all other rows. Argument
// checks, the work's partition over threads, registration. The arithmetic is in linear/kernel.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "common/element.h"
#include "cpu/capability.h"
#include "cpu/linear/problem.h"

namespace simsd {
namespace linear {
namespace {

constexpr const char* OP = "thin_linear";
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

// The weight's rows of K elements, read as float32: in place where that is what they are, else from a converted copy.
struct Weight {
    const void* data;
    int64_t row_stride, stride, k;
    Element element;

    bool in_place() const { return element == Element::float32 && (stride == 1 || k <= 1); }

    // Points `pointers` at rows first .. first + count; `memory` (count * K floats) takes copies where there must be.
    void read(const Kernels& kernels, int64_t first, int64_t count, float* memory, const float** pointers) const {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t offset = (first + i) * row_stride;
            if (in_place()) {
                pointers[i] = static_cast<const float*>(data) + offset;
            } else {
                kernels.convert(element, data, offset, stride, k, memory + i * k);
                pointers[i] = memory + i * k;
            }
        }
    }
};

struct Problem {
    const Kernels& kernels;
    Weight weight;   // [N, K]
    const float* x;  // [M, K], contiguous
    void* out;       // [M, N], contiguous, in the weight's dtype
    int64_t rows, columns, threads;
};

std::unique_ptr<float[]> uninitialised(int64_t floats) { return std::unique_ptr<float[]>(new float[floats]); }

// out[row .. row + count][column .. column + width] from float32 [count, kernels.columns].
void store_tile(const Problem& p, int64_t row, int64_t count, int64_t column, int64_t width, const float* tile) {
    const auto store = [&](auto* out) {
        for (int64_t r = 0; r < count; ++r) {
            for (int64_t c = 0; c < width; ++c) {
                out[(row + r) * p.columns + column + c] = tile[r * p.kernels.columns + c];
            }
        }
    };
    switch (p.weight.element) {
        case Element::float32:
            return store(static_cast<float*>(p.out));
        case Element::bfloat16:
            return store(static_cast<torch::headeronly::BFloat16*>(p.out));
        default:
            return store(static_cast<torch::headeronly::Half*>(p.out));
    }
}

// All rows' outputs of the weight rows first .. first + width. x's rows are cut into blocks of nearly equal size.
void multiply_panel(const Problem& p, int64_t first, int64_t width, float* memory) {
    const int64_t k = p.weight.k, step = p.kernels.columns;
    const float* weight[MAX_PANEL];
    p.weight.read(p.kernels, first, width, memory, weight);
    // The last tile is filled up with a repeated row, whose outputs are dropped.
    for (int64_t c = width; c % step != 0; ++c) weight[c] = weight[width - 1];
    const int64_t blocks = divide_up(p.rows, p.kernels.rows);
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t row = block * p.rows / blocks, count = (block + 1) * p.rows / blocks - row;
        for (int64_t c = 0; c < width; c += step) {
            const int64_t column = first + c;
            if (p.weight.element == Element::float32 && c + step <= width) {
                float* out = static_cast<float*>(p.out) + row * p.columns + column;
                p.kernels.multiply(count, p.x + row * k, weight + c, k, out, p.columns);
            } else {
                float tile[MAX_TILE];
                p.kernels.multiply(count, p.x + row * k, weight + c, k, tile, step);
                store_tile(p, row, count, column, std::min(step, width - c), tile);
            }
        }
    }
}

void multiply(const Problem& p) {
    const double flops = 2.0 * p.rows * p.columns * p.weight.k;
    const int64_t threads = flops < SERIAL_FLOPS ? 1 : p.threads;
    const int64_t step = p.kernels.columns;
    const int64_t panel = std::min(MAX_PANEL, divide_up(divide_up(p.columns, 4 * threads), step) * step);
    const int64_t panels = divide_up(p.columns, panel);
    const auto work = [&](int64_t begin, int64_t end) {
        const auto memory = uninitialised(p.weight.in_place() ? 0 : panel * p.weight.k);
        for (int64_t i = begin; i < end; ++i) {
            multiply_panel(p, i * panel, std::min(panel, p.columns - i * panel), memory.get());
        }
    };
    if (threads == 1) {
        work(0, panels);
    } else {
        torch::stable::parallel_for(0, panels, 1, work);
    }
}

Tensor thin_linear(const Tensor x, const Tensor weight) {
    check(x.dim() >= 1, OP, ": x must be [..., K], got ", shape_text(x));
    check_shape(OP, "weight", weight, {-1, x.size(x.dim() - 1)}, "[N, K]");
    check_dtype(OP, "x", x, FLOATS);
    check_dtype(OP, "weight", weight, {x.scalar_type()});
    check_cpu(OP, "x", x, x);
    check_cpu(OP, "weight", weight, x);
    const int64_t columns = weight.size(0), k = weight.size(1);
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = columns;
    Tensor out = torch::stable::new_empty(x, shape);
    if (out.numel() == 0) return out;

    const Element element = element_of<Element>(x);
    const Kernels& used = kernels();
    const int64_t rows = out.numel() / columns;
    const Tensor contiguous = x.is_contiguous() ? x : torch::stable::contiguous(x);
    const void* data = contiguous.const_data_ptr();
    const auto memory = uninitialised(element == Element::float32 ? 0 : rows * k);
    if (element != Element::float32) used.convert(element, data, 0, 1, rows * k, memory.get());
    multiply({used,
              {weight.const_data_ptr(), weight.stride(0), weight.stride(1), k, element},
              element == Element::float32 ? static_cast<const float*>(data) : memory.get(),
              out.mutable_data_ptr(),
              rows,
              columns,
              torch::stable::get_num_threads()});
    return out;
}

}  // namespace
}  // namespace linear
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("thin_linear", TORCH_BOX(&simsd::linear::thin_linear)); }
