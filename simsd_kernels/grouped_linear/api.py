"""One linear layer per group of rows: the products of a mixture of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.grouped_linear import reference
from simsd_kernels.ops import implement, refuse_gradients
from simsd_kernels.thin_linear.api import check_quantization, obstacle

OP = "grouped_linear"


def grouped_linear(
    x: Tensor, weight: Tensor, offsets: Tensor, scale: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """y[r] = weight[e] x[r] for offsets[e] <= r < offsets[e + 1]: rows sorted by expert, each times its own weight.

    A row's bits are those of `thin_linear(x[r], weight[e], scale[e])` on the same backend: they depend on nothing but
    the row and its expert's weight, not on the number of rows, the size of the group or the row's place. The weight of
    an expert without rows is not read. The host reads no offsets, whose values fix no shape.

    Args:
        x: [M, K], float32, bfloat16 or float16 (`reference` also takes float64); any strides.
        weight: [E, N, K], the dtype of x, or int8; any strides, fastest with K contiguous.
        offsets: int32 [E + 1], from 0 to M, none smaller than the one before (looked at on the CPU; on CUDA rows of no
            expert are left as the memory was); any strides.
        scale: [E, N], float32 or the dtype of x, with an int8 weight and only there (see `thin_linear`); any strides.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Returns:
        [M, N] in the dtype of x, accumulated in float32.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, naming what was given.
        RuntimeError: an explicit backend cannot serve the call, or an argument requires grad: there is no backward.
    """
    check(x, weight, offsets, scale)
    refuse_gradients(OP, x, weight, offsets, scale)
    match dispatch.choose(OP, backend, x.device, lambda name: obstacle(name, x)):
        case "reference":
            return reference.grouped_linear(x, weight, offsets, scale)
        case "triton":
            from simsd_kernels.grouped_linear import triton

            return triton.grouped_linear(x, weight, offsets, scale)
        case compiled:
            return dispatch.operator(OP, compiled)(x, weight, offsets, scale)


def check(x, weight, offsets, scale) -> None:
    for name, value in (("x", x), ("weight", weight), ("offsets", offsets)):
        validate.tensor(OP, name, value)
    validate.shape(OP, "x", x, (None, None), "[M, K]")
    validate.shape(OP, "weight", weight, (None, None, x.shape[1]), "[E, N, K]")
    validate.shape(OP, "offsets", offsets, (weight.shape[0] + 1,), "[E + 1]")
    validate.dtype(OP, "x", x, (*validate.FLOATS, torch.float64))
    check_quantization(OP, x, weight, scale, "[E, N]")
    validate.dtype(OP, "offsets", offsets, torch.int32)
    validate.same_device(OP, x=x, weight=weight, offsets=offsets, scale=scale)
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        check_values(offsets, x.shape[0])


def check_values(offsets: Tensor, rows: int) -> None:
    first, last = int(offsets[0]), int(offsets[-1])
    if (first, last) != (0, rows):
        raise ValueError(f"{OP}: offsets must run from 0 to M = {rows}, got {first} to {last}")
    if len(offsets) > 1 and int(offsets.diff().amin()) < 0:
        at = int(offsets.diff().argmin())
        raise ValueError(
            f"{OP}: offsets must not decrease, got {int(offsets[at + 1])} after {int(offsets[at])} for expert {at}"
        )


def _reference(x, weight, offsets, scale=None) -> Tensor:
    check(x, weight, offsets, scale)
    return reference.grouped_linear(x, weight, offsets, scale)


def _triton(x, weight, offsets, scale=None) -> Tensor:
    from simsd_kernels.grouped_linear import triton

    check(x, weight, offsets, scale)
    return triton.grouped_linear(x, weight, offsets, scale)


implement(OP, _reference, _triton, lambda x, weight, offsets, scale=None: obstacle("triton", x))
