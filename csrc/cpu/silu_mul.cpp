// silu_mul: silu(gate) * up for the two halves of a row, piece by piece (layer/kernel.h).
#include "common/arguments/silu_mul.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>

#include "cpu/allocate.h"
#include "cpu/layer/row.h"

namespace simsd {
namespace layer {
namespace {

constexpr int64_t PIECE = 4096;             // elements of a row that a thread takes at a time
constexpr int64_t SERIAL_ELEMENTS = 65536;  // some 30 us; waking a second thread took 14 to 22 on two busy cores

Tensor silu_mul(const Tensor gate_up) {
    check_silu_mul(check_cpu, gate_up);
    const int64_t last = gate_up.dim() - 1, size = gate_up.size(last) / 2;
    std::array<int64_t, MAX_LEADING + 1> sizes;
    for (int64_t axis = 0; axis < last; ++axis) sizes[axis] = gate_up.size(axis);
    sizes[last] = size;
    Tensor out = allocate(sizes.data(), last + 1, gate_up.scalar_type());
    const Rows<1> rows = rows_of(gate_up);
    if (rows.count == 0 || size == 0) return out;
    const int64_t bytes = gate_up.element_size(), stride = rows.element_strides[0];
    const auto serve_piece = kernels().silu_mul[static_cast<int>(element_of<Element>(gate_up))];
    const char* data = static_cast<const char*>(gate_up.const_data_ptr());
    char* out_data = static_cast<char*>(out.mutable_data_ptr());
    const int64_t pieces = (size + PIECE - 1) / PIECE;
    const auto serve = [&](int64_t begin, int64_t end) {
        for (int64_t piece = begin; piece < end; ++piece) {
            const int64_t row = piece / pieces, first = piece % pieces * PIECE;
            const char* gate = data + (rows.offset(0, row) + first * stride) * bytes;
            serve_piece(gate, gate + size * stride * bytes, stride, std::min(PIECE, size - first),
                        out_data + (row * size + first) * bytes);
        }
    };
    const int64_t grain = SERIAL_ELEMENTS / std::min(size, PIECE) + 1;
    if (rows.count * pieces <= grain) {
        serve(0, rows.count * pieces);
    } else {
        torch::stable::parallel_for(0, rows.count * pieces, grain, serve);
    }
    return out;
}

}  // namespace
}  // namespace layer
}  // namespace simsd

STABLE_TORCH_LIBRARY_IMPL(simsd, CPU, m) { m.impl("silu_mul", TORCH_BOX(&simsd::layer::silu_mul)); }
