#pragma once

#include "common/arguments/expect.h"
#include "common/arguments/rows.h"

namespace simsd {

inline void check_silu_mul(DeviceCheck check_device, const Tensor& gate_up) {
    constexpr const char* OP = "silu_mul";
    check_rows(OP, "gate_up", gate_up, "[..., 2 * I]");
    check(gate_up.size(gate_up.dim() - 1) % 2 == 0, OP,
          ": gate_up must be [..., 2 * I], with an even last dimension, got ", shape_text(gate_up));
    check_dtype(OP, "gate_up", gate_up, FLOATS);
    check_device(OP, "gate_up", gate_up, gate_up);
}

}  // namespace simsd
