"""A linear layer whose rows do not depend on how many of them there are."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.ops import implement
from simsd_kernels.thin_linear import reference

OP = "thin_linear"


def thin_linear(x: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """y = x W^T, each row bit-identical whatever the number, contents and order of the other rows.

    A BLAS promises no such thing: it picks kernels, and with them the order of summation, by the number of rows, so a
    token's logits may change in the last bit when another token joins its forward. Here an output's sum runs over K in
    one fixed order, which threads, strides and the weight's other rows do not change either. The bits may differ
    between backends and instruction sets. Differentiable on every backend.

    Args:
        x: [..., K], float32, bfloat16 or float16 (`reference` also takes float64); any strides.
        weight: [N, K], the dtype of x; any strides, fastest with K contiguous.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Returns:
        [..., N] in the dtype of x, accumulated in float32.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, naming what was given.
        RuntimeError: an explicit backend cannot serve the call.
    """
    check(x, weight)
    match dispatch.choose(OP, backend, x.device, lambda name: obstacle(name, x)):
        case "reference":
            return reference.thin_linear(x, weight)
        case "triton":
            return _Triton.apply(x, weight)
        case compiled:
            return dispatch.operator(OP, compiled)(x, weight)


def check(x, weight) -> None:
    for name, value in (("x", x), ("weight", weight)):
        validate.tensor(OP, name, value)
    if x.dim() == 0:
        raise ValueError(f"{OP}: x must be [..., K], got a tensor without dimensions")
    validate.shape(OP, "weight", weight, (None, x.shape[-1]), "[N, K]")
    validate.dtype(OP, "x", x, (*validate.FLOATS, torch.float64))
    validate.dtype(OP, "weight", weight, x.dtype)
    validate.same_device(OP, x=x, weight=weight)


def obstacle(backend: str, x: Tensor) -> str | None:
    """What about these arguments keeps `backend` from serving; None if nothing does."""
    if backend != "reference" and x.dtype not in validate.FLOATS:
        return f"supports float32, bfloat16 and float16, got {x.dtype}"
    return None


def _reference(x, weight) -> Tensor:
    check(x, weight)
    return reference.thin_linear(x, weight)


def _triton(x, weight) -> Tensor:
    from simsd_kernels.thin_linear import triton

    check(x, weight)
    return triton.thin_linear(x, weight)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of x and weight, by torch's own products: training needs no bits to repeat."""
    x, weight = ctx.saved_tensors
    for_x = for_weight = None
    with dispatch.without_autocast(x.device):
        if ctx.needs_input_grad[0]:
            for_x = gradient @ weight
        if ctx.needs_input_grad[1]:
            for_weight = gradient.reshape(-1, weight.shape[0]).T @ x.reshape(-1, weight.shape[1])
    return for_x, for_weight


class _Triton(torch.autograd.Function):
    """Triton asked for by name, with the gradients that the op has."""

    @staticmethod
    def forward(x, weight):
        from simsd_kernels.thin_linear import triton

        return triton.thin_linear(x, weight)

    setup_context = staticmethod(_save)
    backward = staticmethod(_gradients)


implement(OP, _reference, _triton, lambda x, weight: obstacle("triton", x), (_save, _gradients))
