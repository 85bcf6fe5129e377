"""Argument checks shared by the op folders. Every message names the argument, what was given and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def shape(op: str, name: str, value: Tensor, expected: Sequence[int | None], letters: str) -> None:
    """Raises ValueError unless `value` has `expected`'s sizes (None: any); `letters` is the shape in words."""
    if value.dim() != len(expected) or any(
        e is not None and e != s for s, e in zip(value.shape, expected, strict=True)
    ):
        wanted = ", ".join("any" if e is None else str(e) for e in expected)
        raise ValueError(f"{op}: {name} must be {letters} = [{wanted}], got {list(value.shape)}")


def rows(op: str, name: str, value: Tensor, letters: str) -> None:
    if not 1 <= value.dim() <= 4:
        raise ValueError(f"{op}: {name} must be {letters} of 1 to 4 dimensions, got {list(value.shape)}")


def dtype(op: str, name: str, value: Tensor, allowed: torch.dtype | Sequence[torch.dtype]) -> None:
    allowed = (allowed,) if isinstance(allowed, torch.dtype) else tuple(allowed)
    if value.dtype not in allowed:
        raise TypeError(f"{op}: {name} must be {' or '.join(map(str, allowed))}, got {value.dtype}")


def same_device(op: str, **tensors: Tensor | None) -> None:
    given = {name: value.device for name, value in tensors.items() if value is not None}
    if len(set(given.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in given.items())
        raise ValueError(f"{op}: all tensors must be on one device, got {listing}")


def within(op: str, name: str, value: Tensor, low: float, high: float, allowed: str) -> None:
    """Raises ValueError unless `low <= value <= high` holds everywhere (NaN does not); `allowed` is the range in words.

    Looks at CPU tensors only: reading a GPU's values would make the host wait for it.
    """
    if value.device.type != "cpu" or value.numel() == 0 or torch.compiler.is_compiling():
        return
    if value.numel() == 1:  # a batch of one is to be fast
        smallest = largest = value.item()
    else:
        smallest, largest = (extreme.item() for extreme in value.aminmax())
    if not (low <= smallest and largest <= high):
        given = largest if low <= smallest else smallest
        raise ValueError(f"{op}: {name} must be {allowed}, got {given}")
