"""A token's output from those of its experts."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.combine_experts import reference
from simsd_kernels.ops import implement, refuse_gradients

OP = "combine_experts"


def combine_experts(y: Tensor, weights: Tensor, places: Tensor, *, backend: str | None = None) -> Tensor:
    """out[m] = sum over c of weights[m, c] * y[places[m, c]]: the experts' rows back in the order of tokens, weighted.

    Rounds as transformers' experts do that compute in groups ("grouped_mm"): each product to the dtype, the sum in
    float32 and then once (on the CPU float32 products may be fused into the sum). It runs in the order of c, so a row's
    bits depend on its own rows of y and weights alone; they may differ between backends and instruction sets.

    Args:
        y: [S, N], float32, bfloat16 or float16 (`reference` also takes float64); any strides.
        weights: [M, C], the dtype of y; any strides.
        places: int32 [M, C], in [0, S) (looked at on the CPU); any strides.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Returns:
        [M, N] in the dtype of y, contiguous.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or value, naming what was given.
        RuntimeError: an explicit backend cannot serve the call, or an argument requires grad: there is no backward.
    """
    check(y, weights, places)
    refuse_gradients(OP, y, weights, places)
    match dispatch.choose(OP, backend, y.device, lambda name: obstacle(name, y)):
        case "reference":
            return reference.combine_experts(y, weights, places)
        case "triton":
            from simsd_kernels.combine_experts import triton

            return triton.combine_experts(y, weights, places)
        case compiled:
            return dispatch.operator(OP, compiled)(y, weights, places)


def check(y, weights, places) -> None:
    for name, value in (("y", y), ("weights", weights), ("places", places)):
        validate.tensor(OP, name, value)
    validate.shape(OP, "y", y, (None, None), "[S, N]")
    validate.shape(OP, "places", places, (None, None), "[M, C]")
    validate.shape(OP, "weights", weights, tuple(places.shape), "[M, C]")
    validate.dtype(OP, "y", y, (*validate.FLOATS, torch.float64))
    validate.dtype(OP, "weights", weights, y.dtype)
    validate.dtype(OP, "places", places, torch.int32)
    validate.same_device(OP, y=y, weights=weights, places=places)
    validate.within(OP, "places", places, 0, len(y) - 1, f"in [0, S) = [0, {len(y)})")


def obstacle(backend: str, y: Tensor) -> str | None:
    """What about these arguments keeps `backend` from serving; None if nothing does."""
    if backend != "reference" and y.dtype not in validate.FLOATS:
        return f"supports float32, bfloat16 and float16, got {y.dtype}"
    return None


def _reference(y, weights, places) -> Tensor:
    check(y, weights, places)
    return reference.combine_experts(y, weights, places)


def _triton(y, weights, places) -> Tensor:
    from simsd_kernels.combine_experts import triton

    check(y, weights, places)
    return triton.combine_experts(y, weights, places)


implement(OP, _reference, _triton, lambda y, weights, places: obstacle("triton", y))
