"""Weights in eight bits or fewer: torchao's tensors, as parameters of the stock modules.

What such a weight is and what the products of the layers read of it. torchao is imported where weights are made or read
from files (`simsd.models.quantization`), not here.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Iterable
from types import ModuleType

import torch
from torch import Tensor

from simsd.errors import SimsdError, one_line

METHODS = ("int8", "int4", "float8")
# torchao's classes, by what `simsd.load(quantize=)` calls them.
CLASSES = {
    "Int8Tensor": "int8",
    "Int4OpaqueTensor": "int4",
    "Int4TilePackedTo4dTensor": "int4",
    "Float8Tensor": "float8",
}
# Matrices of the decoder's linear layers and of its experts, packed or one by one; not those of routers.
_MATRIX = re.compile(r"model\.layers\.\d+\.(?:.*_proj\.weight|mlp\.experts\.(?:gate_up_proj|down_proj))")


def is_matrix(name: str) -> bool:
    """Whether the weight of that name in a model is one to quantize."""
    return _MATRIX.fullmatch(name) is not None


def is_quantized(weight: Tensor) -> bool:
    return type(weight).__module__.startswith("torchao.")


def method_of(weights: Iterable[Tensor]) -> str | None:
    """What `simsd.load(quantize=)` calls the quantized ones among the weights; None if there are none."""
    found = next((weight for weight in weights if is_quantized(weight)), None)
    return None if found is None else CLASSES.get(type(found).__name__, type(found).__name__)


def has_row_scales(weight: Tensor) -> bool:
    """Whether `thin_linear` and `grouped_linear` read the weight: int8 values, one scale for each row, and activations
    as they are."""
    return (
        type(weight).__name__ == "Int8Tensor"
        and weight.scale.shape == (*weight.shape[:-1], 1)
        and list(weight.block_size) == [1] * (weight.dim() - 1) + [weight.shape[-1]]
        and weight.act_quant_kwargs is None
        and weight.act_pre_scale is None
    )


def stored(weight: Tensor) -> tuple[Tensor, ...]:
    """The plain tensors that a product reads: the weight or, of one with row scales, int8 [.., N, K] and [.., N, 1]."""
    return (weight.qdata, weight.scale) if has_row_scales(weight) else (weight,)


def operands(*parts: Tensor) -> tuple[Tensor, ...]:
    """What `thin_linear` and `grouped_linear` take of a weight's `stored` tensors: itself, or values and scales."""
    return parts if len(parts) == 1 else (parts[0], parts[1].squeeze(-1))


def data_of(weight: Tensor) -> list[Tensor]:
    """Every plain tensor of a weight."""
    if not is_quantized(weight):
        return [weight]
    return [value for value in vars(weight).values() if isinstance(value, Tensor)]


def is_finite(weight: Tensor) -> bool:
    """Whether no value is NaN or infinite; of a quantized weight its scales tell."""
    parts = [weight]
    if is_quantized(weight):
        parts = [part for part in data_of(weight) if part.is_floating_point() and part.itemsize > 1]
    # One pass, nothing allocated, no overflow; where there is a NaN both extremes are it.
    return all(math.isfinite(extreme.item()) for p in parts if p.numel() for extreme in p.detach().aminmax())


def rebuilt(like: Tensor, values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight with row scales, as `like` is, of int8 [.., N, K] and [.., N, 1], for activations in `dtype`."""
    return type(like)(values, scales, [1] * (values.dim() - 1) + [values.shape[-1]], dtype)


def check_method(method: object) -> None:
    """Raises SimsdError unless `load(quantize=)` knows it."""
    if method is not None and method not in METHODS:
        raise SimsdError(f"quantize must be {', '.join(METHODS)} or None, got {method!r}")


def check_products(method: str, deterministic: bool | None, thin_linear: bool | None) -> None:
    """Raises SimsdError where our products are asked for, of weights that only torchao's read."""
    asked = [f"{name}=True" for name, on in {"deterministic": deterministic, "thin_linear": thin_linear}.items() if on]
    if asked:
        raise SimsdError(
            f"{method} weights are read by torchao's products, whose rows may depend on each other: leave out"
            f" {' and '.join(asked)}, or take quantize='int8'"
        )


def converter(
    source: str, method: str | None, dtype: torch.dtype | None, device: torch.device
) -> Callable[[str, Tensor], Tensor]:
    """A function of a weight's name in the model and a tensor that gives what the model shall hold: the tensor,
    quantized where it is a matrix of the decoder's layers and there is a `method`; one that is quantized already for
    activations in `dtype` (None: its own).

    It raises SimsdError, one line that begins with `source`, where a weight cannot be had.
    """

    def convert(name: str, tensor: Tensor) -> Tensor:
        if is_quantized(tensor):
            given = CLASSES.get(type(tensor).__name__)
            if method not in (None, given):
                raise SimsdError(f"{source} is quantized already, by {given}, got quantize={method!r}: leave it out")
            return quantization().adopt(source, name, tensor, dtype, device)
        if method is None or not is_matrix(name):
            return tensor
        made = quantization().quantize(source, name, tensor.detach().to(device, dtype or tensor.dtype), method)
        return quantization().adopt(source, name, made, dtype, device)

    return convert


def quantization() -> ModuleType:
    """`simsd.models.quantization`. Raises SimsdError where torchao is missing."""
    try:
        return importlib.import_module("simsd.models.quantization")
    except ImportError as error:
        raise SimsdError(
            f'quantized weights need torchao: pip install "simsd-kernels[quantize]" ({one_line(error)})'
        ) from error
