"""Quantized weights by torchao: made of those of a model's layers, rebuilt from a checkpoint's files, and saved.

Embeddings, the head, norms and routers stay as they are. Import it by `quantized.quantization()`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torchao.core.config import AOBaseConfig
from torchao.prototype.safetensors.safetensors_support import unflatten_tensor_state_dict
from torchao.prototype.safetensors.safetensors_utils import is_metadata_torchao
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int4WeightOnlyConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    PerRow,
    quantize_,
)
from torchao.quantization.quantize_.workflows import Int4PackingFormat
from transformers import PreTrainedConfig, PreTrainedModel, TorchAoConfig
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from simsd.errors import SimsdError, one_line
from simsd.models.quantized import CLASSES, has_row_scales, is_quantized, method_of, rebuilt

GROUPS = (128, 64, 32)  # columns that share a scale in int4; the largest that divides a matrix's
_AT_A_TIME = 1 << 19  # elements that int8 takes at a time: torchao makes several copies in float32
FLOAT8_CAPABILITY = (8, 9)  # of the first GPUs with float8


def check(method: str, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> None:
    """Raises SimsdError unless torchao's products serve a model like this on the device."""
    has_experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    if has_experts and method != "int8":
        raise SimsdError(f"quantize={method!r} is for dense models: a mixture's experts take quantize='int8'")
    if method == "float8":
        _check_float8(device)
    if method == "int4" and device.type not in ("cpu", "cuda"):
        raise SimsdError(f"quantize='int4' is for the CPU and CUDA, got device {device}")
    if method == "int4" and device.type == "cuda" and dtype != torch.bfloat16:
        raise SimsdError(f"quantize='int4' on CUDA computes in bfloat16, got {dtype}: pass dtype='bfloat16'")


def _check_float8(device: torch.device) -> None:
    if device.type != "cuda":
        raise SimsdError(f"float8 weights need a GPU that has float8, got device {device}: quantize='int8' runs here")
    if (capability := torch.cuda.get_device_capability(device)) < FLOAT8_CAPABILITY:
        raise SimsdError(
            f"float8 weights need a GPU of compute capability 8.9 or higher, got {'.'.join(map(str, capability))}:"
            " quantize='int8' runs here"
        )


def quantize(source: str, name: str, weight: Tensor, method: str) -> Tensor:
    """A matrix, on its device and in its dtype, quantized. Raises SimsdError, one line that begins with `source`, for
    one that the method cannot hold."""
    if method == "int8":
        values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        scales = torch.empty(*weight.shape[:-1], 1, device=weight.device)
        quantize_rows(weight, values, scales)
        return with_row_scales(values, scales, weight.dtype)
    holder = nn.Linear(1, 1, bias=False, device="meta")
    holder.weight = nn.Parameter(weight, requires_grad=False)
    quantize_(holder, _config(f"{source}: {name}", method, weight))
    del holder.extra_repr  # torchao's, which refers to the holder: it would keep the weight
    return holder.weight.detach()


def quantize_rows(rows: Tensor, values: Tensor, scales: Tensor) -> None:
    """Puts rows [.., N, K] in int8 into `values` [.., N, K] and `scales` [.., N, 1], a MiB or so at a time."""
    at_a_time = max(1, _AT_A_TIME // max(1, rows.shape[-1]))
    views = (x.flatten(0, -2).split(at_a_time) for x in (rows, values, scales))
    for some, their_values, their_scales in zip(*views, strict=True):
        made = Int8Tensor.from_hp(some, PerRow())
        their_values.copy_(made.qdata)
        their_scales.copy_(made.scale)


def with_row_scales(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight of int8 values [.., N, K] and scales [.., N, 1], for activations in `dtype`."""
    return Int8Tensor(values, scales, [1] * (values.dim() - 1) + [values.shape[-1]], dtype)


def _config(place: str, method: str, weight: Tensor) -> AOBaseConfig:
    """torchao's configuration for a matrix; torch.compile's settings are left alone."""
    if method == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if method == "float8":
        return Float8WeightOnlyConfig(set_inductor_config=False)
    rows, columns = weight.shape
    group = next((group for group in GROUPS if columns % group == 0), None)
    if group is None or rows % 16:
        raise SimsdError(
            f"{place} is {[rows, columns]}: int4 takes rows in multiples of 16 and columns of {GROUPS[-1]}; use int8"
        )
    if weight.device.type == "cuda":
        packing = Int4PackingFormat.TILE_PACKED_TO_4D
        return Int4WeightOnlyConfig(group_size=group, int4_packing_format=packing, set_inductor_config=False)
    try:
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    except ImportError as error:
        raise SimsdError(f"quantize='int4' on the CPU needs torchao 0.18 or newer ({one_line(error)})") from error
    return PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False)


def adopt(source: str, name: str, weight: Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """A weight that was quantized elsewhere, for activations in `dtype` (None: its own).

    Raises SimsdError, one line that begins with `source`, where it is none that `load(quantize=)` makes, or cannot
    serve here.
    """
    kind = type(weight).__name__
    if kind not in CLASSES:
        raise SimsdError(f"{source}: {name} is torchao's {kind}: {', '.join(CLASSES)} are supported")
    if getattr(weight, "act_quant_kwargs", None) is not None or getattr(weight, "act_pre_scale", None) is not None:
        raise SimsdError(
            f"{source}: {name} quantizes activations, too: quantize weights alone, as Int8WeightOnlyConfig"
        )
    if kind == "Float8Tensor":
        _check_float8(device)
    needed = {"Int4OpaqueTensor": "cpu", "Int4TilePackedTo4dTensor": "cuda"}.get(kind, device.type)
    if device.type != needed:
        raise SimsdError(f"{source}: {name} is int4 packed for {needed}, got device {device}: quantize it there")
    if kind == "Int8Tensor":
        if not has_row_scales(weight) or (weight.zero_point is not None and weight.zero_point.any()):
            raise SimsdError(
                f"{source}: {name} is int8 by blocks {weight.block_size}, or not symmetric: one scale for"
                " each row is read, and no zero points (Int8WeightOnlyConfig's default)"
            )
        # Values and scales do not depend on the dtype of activations.
        return rebuilt(weight, weight.qdata, weight.scale.float(), dtype or weight.dtype)
    if dtype not in (None, weight.dtype):
        raise SimsdError(f"{source}: {name} was quantized in {weight.dtype}, which stays: leave out dtype, got {dtype}")
    return weight


def _described(source: str, metadata: Mapping[str, str]) -> dict[str, dict]:
    """What safetensors files with this metadata say of each tensor that torchao stored in them."""
    if not is_metadata_torchao(metadata):
        raise SimsdError(
            f"{source}: its configuration says that torchao quantized it, its files do not say how: save it again by"
            " transformers 5 and torchao 0.16 or newer"
        )
    return {name: json.loads(metadata[name]) for name in json.loads(metadata["tensor_names"])}


def method_in(source: str, metadata: Mapping[str, str]) -> str | None:
    """How the weights are stored, as `load(quantize=)` calls it; None: none is quantized."""
    kinds = (fields["_type"] for fields in _described(source, metadata).values())
    return next((CLASSES.get(kind, kind) for kind in kinds if kind != "Tensor"), None)


def joined(
    source: str, metadata: Mapping[str, str], tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a checkpoint's files, with the quantized weights in the place of those that they are made
    of.

    Raises SimsdError where `metadata`, which the safetensors files hold, is not torchao's, or tensors are missing.
    """
    parts = {}  # of each quantized weight
    for name, fields in _described(source, metadata).items():
        module, _, parameter = name.rpartition(".")
        if names := fields.get("_tensor_data_names"):
            parts[name] = {f"{module}._{parameter}_{part}" for part in names}
    owners = {part: name for name, names in parts.items() for part in names}
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        owner = owners.get(name)
        if owner is None:
            yield name, tensor
            continue
        found = waiting.setdefault(owner, {})
        found[name] = tensor
        if found.keys() == parts[owner]:
            yield owner, _rebuild(source, owner, metadata, waiting.pop(owner))
    if waiting:
        missing = sorted(part for name, found in waiting.items() for part in parts[name] - found.keys())
        raise SimsdError(f"{source}: tensors are missing: {', '.join(missing[:4])}")


def _rebuild(source: str, name: str, metadata: Mapping[str, str], parts: Mapping[str, Tensor]) -> Tensor:
    own = {"tensor_names": json.dumps([name]), name: metadata[name]}
    try:
        return unflatten_tensor_state_dict(dict(parts), own)[0][name]
    except (KeyError, TypeError, ValueError) as error:
        raise SimsdError(f"{source}: torchao cannot rebuild {name}: {one_line(error)}") from error


class _Unsaved(TorchAoHfQuantizer):
    def is_serializable(self, *args, **kwargs) -> bool:
        raise SimsdError(
            "int4 weights that are packed for the CPU cannot be saved: save the model that they were made of instead"
        )


def declare(model: PreTrainedModel) -> None:
    """Tells transformers of the model's quantized weights: `save_pretrained` writes them as it writes those that it
    quantized itself."""
    weight = next(weight for weight in model.model.layers.parameters() if is_quantized(weight))
    fields = getattr(model.config, "quantization_config", None)
    try:
        own = TorchAoConfig(_config("", method_of([weight]), weight))
        config = TorchAoConfig.from_dict(fields) if isinstance(fields, dict) else own
    except Exception as error:  # of torchao or transformers, of a type for each kind of mistake
        raise SimsdError(f"quantization_config is not valid: {one_line(error)}") from error
    kind = _Unsaved if type(weight).__name__ == "Int4OpaqueTensor" else TorchAoHfQuantizer
    model.hf_quantizer, model.is_quantized = kind(config, pre_quantized=True), True
    model.config.quantization_config = config
