#pragma once

#include "common/arguments/expect.h"
#include "common/arguments/rows.h"

namespace simsd {

inline void check_add_rms_norm(DeviceCheck check_device, const std::optional<Tensor>& x, const Tensor& residual,
                               const Tensor& weight) {
    const Expect expect{"add_rms_norm", check_device, residual};
    check_rows(expect.op, "residual", residual, "[..., D]");
    check_dtype(expect.op, "residual", residual, FLOATS);
    check_device(expect.op, "residual", residual, residual);
    const ScalarType dtype = residual.scalar_type();
    if (x) {
        bool same = x->dim() == residual.dim();
        for (int64_t axis = 0; same && axis < x->dim(); ++axis) same = x->size(axis) == residual.size(axis);
        check(same, expect.op, ": x must have the shape of residual, ", shape_text(residual), ", got ", shape_text(*x));
        check_dtype(expect.op, "x", *x, {dtype});
        check_device(expect.op, "x", *x, residual);
        for (int64_t axis = 0; axis < residual.dim(); ++axis) {
            check(residual.size(axis) < 2 || residual.stride(axis) != 0, expect.op,
                  ": residual is written in place and must not be expanded, got stride 0 in dimension ", axis);
        }
    }
    expect("weight", weight, {dtype}, {residual.size(residual.dim() - 1)}, "[D]");
}

}  // namespace simsd
