"""Which rows the experts of a layer get: tokens' choices sorted by expert, without the host learning how many."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from simsd_kernels import dispatch, validate
from simsd_kernels.ops import implement, refuse_gradients
from simsd_kernels.sort_by_expert import reference

OP = "sort_by_expert"


class SortedByExpert(NamedTuple):
    """Row i of M * C sorted rows is one of expert e where offsets[e] <= i < offsets[e + 1]; stable: by token, then by
    choice.

    Attributes:
        offsets: int32 [n_experts + 1], as `grouped_linear` takes them.
        rows: int32 [M * C]. The token of each sorted row.
        places: int32 [M, C]. The sorted row of each choice: the inverse, as `combine_experts` takes it.
    """

    offsets: Tensor
    rows: Tensor
    places: Tensor


def sort_by_expert(experts: Tensor, n_experts: int, *, backend: str | None = None) -> SortedByExpert:
    """Sorts the choices of M tokens, C experts each, by expert. The sizes of what it returns do not depend on values.

    Args:
        experts: int64 [M, C], in [0, n_experts) (looked at on the CPU; on CUDA one outside gets no place and no row);
            any strides.
        n_experts: how many there are, at least 1.
        backend: "reference", "cpu", "triton" or "cuda"; None chooses (see `simsd_kernels.dispatch`).

    Raises:
        TypeError, ValueError: a wrong dtype, shape or value, naming what was given.
        RuntimeError: an explicit backend cannot serve the call.
    """
    check(experts, n_experts)
    refuse_gradients(OP, experts, n_experts)
    match dispatch.choose(OP, backend, experts.device, lambda name: None):
        case "reference":
            out = reference.sort_by_expert(experts, n_experts)
        case "triton":
            from simsd_kernels.sort_by_expert import triton

            out = triton.sort_by_expert(experts, n_experts)
        case compiled:
            out = dispatch.operator(OP, compiled)(experts, n_experts)
    return SortedByExpert(*out)


def check(experts, n_experts) -> None:
    validate.tensor(OP, "experts", experts)
    validate.shape(OP, "experts", experts, (None, None), "[M, C]")
    validate.dtype(OP, "experts", experts, torch.int64)
    if isinstance(n_experts, bool) or not isinstance(n_experts, int | torch.SymInt):
        raise TypeError(f"{OP}: n_experts must be an integer, got {n_experts!r}")
    if n_experts < 1:
        raise ValueError(f"{OP}: n_experts must be at least 1, got {n_experts}")
    validate.within(OP, "experts", experts, 0, n_experts - 1, f"in [0, n_experts) = [0, {n_experts})")


def _reference(experts, n_experts) -> tuple[Tensor, Tensor, Tensor]:
    check(experts, n_experts)
    return reference.sort_by_expert(experts, n_experts)


def _triton(experts, n_experts) -> tuple[Tensor, Tensor, Tensor]:
    from simsd_kernels.sort_by_expert import triton

    check(experts, n_experts)
    return triton.sort_by_expert(experts, n_experts)


implement(OP, _reference, _triton, lambda experts, n_experts: None)
