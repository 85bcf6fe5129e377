"""A linear layer whose rows do not depend on how many of them there are."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.ops import implement
from simsd_kernels.thin_linear import reference

OP = "thin_linear"


def thin_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """y = x W^T, each row bit-identical whatever the number, contents and order of the other rows.

    A BLAS promises no such thing: it picks kernels, and with them the order of summation, by the number of rows, so a
    token's logits may change in the last bit when another token joins its forward. Here an output's sum runs over K in
    one fixed order, which threads, strides and the weight's other rows do not change either. The bits may differ
    between backends and instruction sets.

    y = scale * (x W^T) of an int8 weight, which is read as it is stored, half the bytes of bfloat16. Every dtype of x
    holds its values exactly; an output's sum in float32 is multiplied by its scale and then rounded to the dtype of x.

    Differentiable on every backend, with respect to all but an int8 weight.

    Args:
        x: [..., K], float32, bfloat16 or float16 (`reference` also takes float64); any strides.
        weight: [N, K], the dtype of x, or int8; any strides, fastest with K contiguous.
        scale: [N], float32 or the dtype of x, with an int8 weight and only there: weight row n stands for
            scale[n] * weight[n], as symmetric quantization per output channel stores it; any stride.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Returns:
        [..., N] in the dtype of x, accumulated in float32.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, naming what was given.
        RuntimeError: an explicit backend cannot serve the call.
    """
    check(x, weight, scale)
    match dispatch.choose(OP, backend, x.device, lambda name: obstacle(name, x)):
        case "reference":
            return reference.thin_linear(x, weight, scale)
        case "triton":
            return _Triton.apply(x, weight, scale)
        case compiled:
            return dispatch.operator(OP, compiled)(x, weight, scale)


def check(x, weight, scale) -> None:
    for name, value in (("x", x), ("weight", weight)):
        validate.tensor(OP, name, value)
    if x.dim() == 0:
        raise ValueError(f"{OP}: x must be [..., K], got a tensor without dimensions")
    validate.shape(OP, "weight", weight, (None, x.shape[-1]), "[N, K]")
    validate.dtype(OP, "x", x, (*validate.FLOATS, torch.float64))
    check_quantization(OP, x, weight, scale, "[N]")
    validate.same_device(OP, x=x, weight=weight, scale=scale)


def check_quantization(op: str, x: Tensor, weight: Tensor, scale, letters: str) -> None:
    """The weight's dtype, and the scale, which an int8 weight has and no other; `letters`: the scale's shape."""
    validate.dtype(op, "weight", weight, (x.dtype, torch.int8))
    if weight.dtype != torch.int8:
        if scale is not None:
            raise TypeError(f"{op}: scale must be left out unless weight is torch.int8, got one with {weight.dtype}")
        return
    if not isinstance(scale, Tensor):
        raise TypeError(f"{op}: scale must be a tensor where weight is torch.int8, got {type(scale).__name__}")
    validate.shape(op, "scale", scale, weight.shape[:-1], letters)
    validate.dtype(op, "scale", scale, dict.fromkeys((torch.float32, x.dtype)))


def obstacle(backend: str, x: Tensor) -> str | None:
    """What about these arguments keeps `backend` from serving; None if nothing does."""
    if backend != "reference" and x.dtype not in validate.FLOATS:
        return f"supports float32, bfloat16 and float16, got {x.dtype}"
    return None


def _reference(x, weight, scale=None) -> Tensor:
    check(x, weight, scale)
    return reference.thin_linear(x, weight, scale)


def _triton(x, weight, scale=None) -> Tensor:
    from simsd_kernels.thin_linear import triton

    check(x, weight, scale)
    return triton.thin_linear(x, weight, scale)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, weight and scale, by torch's own products: training needs no bits to repeat."""
    x, weight, scale = ctx.saved_tensors
    for_x = for_weight = for_scale = None
    with dispatch.without_autocast(x.device):
        if ctx.needs_input_grad[0]:
            for_x = gradient @ (weight if scale is None else (weight * scale[:, None]).to(x.dtype))
        if ctx.needs_input_grad[1]:
            for_weight = gradient.reshape(-1, weight.shape[0]).T @ x.reshape(-1, weight.shape[1])
        if scale is not None and ctx.needs_input_grad[2]:
            for_scale = (gradient * (x @ weight.T.to(x.dtype))).reshape(-1, weight.shape[0]).sum(0).to(scale.dtype)
    return for_x, for_weight, for_scale


class _Triton(torch.autograd.Function):
    """Triton asked for by name, with the gradients that the op has."""

    @staticmethod
    def forward(x, weight, scale):
        from simsd_kernels.thin_linear import triton

        return triton.thin_linear(x, weight, scale)

    setup_context = staticmethod(_save)
    backward = staticmethod(_gradients)


implement(OP, _reference, _triton, lambda x, weight, scale=None: obstacle("triton", x), (_save, _gradients))
