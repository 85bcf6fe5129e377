"""What lies between the gate and up product of a layer's MLP and its down product."""

from __future__ import annotations

import torch
from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.ops import implement, refuse_gradients
from simsd_kernels.silu_mul import reference

OP = "silu_mul"


def silu_mul(gate_up: Tensor, *, backend: str | None = None) -> Tensor:
    """Returns silu(gate) * up for the two halves of the last dimension.

    Rounds as transformers' MLP does: silu(x) = x / (1 + e^-x) in float32, rounded to the dtype, then times up in it.
    What may differ from the module is the exponential, by some units in the last place of float32; in 16 bits that
    shows where it moves a value over the border between two of the dtype. A gate of -inf counts as what it stands for,
    a number too large for the dtype, and gives 0, where the module gives NaN; silu(x) closer to 0 than 1e-35 may be 0.

    An element's bits depend on its gate and up alone, not on its place, the number of elements, or the threads. They
    may differ between backends and instruction sets.

    Args:
        gate_up: [..., 2 * I] of 1 to 4 dimensions, the gate first, as one product over both weights leaves it; float32,
            bfloat16 or float16 (`reference` also takes float64); any strides.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Returns:
        [..., I] in the dtype of gate_up, contiguous.

    Raises:
        TypeError, ValueError: a wrong dtype or shape, naming what was given.
        RuntimeError: an explicit backend cannot serve the call, or an argument requires grad: there is no backward.
    """
    check(gate_up)
    refuse_gradients(OP, gate_up)
    match dispatch.choose(OP, backend, gate_up.device, lambda name: obstacle(name, gate_up)):
        case "reference":
            return reference.silu_mul(gate_up)
        case "triton":
            from simsd_kernels.silu_mul import triton

            return triton.silu_mul(gate_up)
        case compiled:
            return dispatch.operator(OP, compiled)(gate_up)


def check(gate_up) -> None:
    validate.tensor(OP, "gate_up", gate_up)
    validate.rows(OP, "gate_up", gate_up, "[..., 2 * I]")
    if gate_up.shape[-1] % 2:
        raise ValueError(f"{OP}: gate_up must be [..., 2 * I], with an even last dimension, got {list(gate_up.shape)}")
    validate.dtype(OP, "gate_up", gate_up, (*validate.FLOATS, torch.float64))


def obstacle(backend: str, gate_up: Tensor) -> str | None:
    """What about these arguments keeps `backend` from serving; None if nothing does."""
    if backend != "reference" and gate_up.dtype not in validate.FLOATS:
        return f"supports float32, bfloat16 and float16, got {gate_up.dtype}"
    return None


def _reference(gate_up) -> Tensor:
    check(gate_up)
    return reference.silu_mul(gate_up)


def _triton(gate_up) -> Tensor:
    from simsd_kernels.silu_mul import triton

    check(gate_up)
    return triton.silu_mul(gate_up)


def _why_not_triton(gate_up) -> str | None:
    return obstacle("triton", gate_up)


implement(OP, _reference, _triton, _why_not_triton)
