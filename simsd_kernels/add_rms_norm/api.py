"""What lies between the products of a layer: the residual stream takes in a product, and its RMSNorm feeds the next."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.add_rms_norm import reference
from simsd_kernels.ops import implement, refuse_gradients

OP = "add_rms_norm"


def add_rms_norm(
    x: Tensor | None, residual: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str | None = None
) -> Tensor:
    """Adds x to the residual in place and returns the residual's RMSNorm.

    Rounds as transformers' decoder layers do: the sum to the dtype; Qwen3RMSNorm of it in float32, rounded to the
    dtype, then times the weight in it. What may differ from the modules is the order in which the D squares are added
    up and the reciprocal root, by some units in the last place of float32; in 16 bits that shows where it moves a
    normed value over the border between two of the dtype (one element in some ten thousands). The residual never
    differs.

    A row's bits depend on that row alone: the sum's order follows from D, not from the number of rows, their strides,
    or the threads. They may differ between backends and instruction sets.

    Args:
        x: [..., D] of the residual's shape and dtype, any strides, not sharing memory with the residual; None leaves
            the residual as it is.
        residual: [..., D] of 1 to 4 dimensions; float32, bfloat16 or float16 (`reference` also takes float64); any
            strides; x is added in place.
        weight: [D], the dtype of the residual.
        eps: added to the mean square.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Returns:
        weight * residual / sqrt(mean(residual^2) + eps) over D: the residual's shape and dtype, contiguous.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device, or an expanded residual, naming what was given; nothing
            is written then.
        RuntimeError: an explicit backend cannot serve the call, or an argument requires grad: there is no backward.
    """
    check(x, residual, weight)
    refuse_gradients(OP, x, residual, weight)
    match dispatch.choose(OP, backend, residual.device, lambda name: obstacle(name, residual)):
        case "reference":
            return reference.add_rms_norm(x, residual, weight, eps)
        case "triton":
            from simsd_kernels.add_rms_norm import triton

            return triton.add_rms_norm(x, residual, weight, eps)
        case compiled:
            return dispatch.operator(OP, compiled)(x, residual, weight, eps)


def check(x, residual, weight) -> None:
    validate.tensor(OP, "residual", residual)
    validate.rows(OP, "residual", residual, "[..., D]")
    validate.dtype(OP, "residual", residual, (*validate.FLOATS, torch.float64))
    if x is not None:
        validate.tensor(OP, "x", x)
        if x.shape != residual.shape:
            raise ValueError(f"{OP}: x must have the shape of residual, {list(residual.shape)}, got {list(x.shape)}")
        validate.dtype(OP, "x", x, residual.dtype)
        for axis, (size, stride) in enumerate(zip(residual.shape, residual.stride(), strict=True)):
            if size > 1 and stride == 0:
                raise ValueError(
                    f"{OP}: residual is written in place and must not be expanded, got stride 0 in dimension {axis}"
                )
    validate.tensor(OP, "weight", weight)
    validate.shape(OP, "weight", weight, residual.shape[-1:], "[D]")
    validate.dtype(OP, "weight", weight, residual.dtype)
    validate.same_device(OP, x=x, residual=residual, weight=weight)


def obstacle(backend: str, residual: Tensor) -> str | None:
    """What about these arguments keeps `backend` from serving; None if nothing does."""
    if backend != "reference" and residual.dtype not in validate.FLOATS:
        return f"supports float32, bfloat16 and float16, got {residual.dtype}"
    return None


def _reference(x, residual, weight, eps) -> Tensor:
    check(x, residual, weight)
    return reference.add_rms_norm(x, residual, weight, eps)


def _triton(x, residual, weight, eps) -> Tensor:
    from simsd_kernels.add_rms_norm import triton

    check(x, residual, weight)
    return triton.add_rms_norm(x, residual, weight, eps)


def _why_not_triton(x, residual, *_) -> str | None:
    return obstacle("triton", residual)


implement(OP, _reference, _triton, _why_not_triton)
