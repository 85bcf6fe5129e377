"""Checkpoint folders in Hugging Face format: checked, and read into a model."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from simsd.errors import SimsdError, one_line
from simsd.models import families, weight_files, weights
from simsd.models.families import Family
from simsd.models.folders import read_json
from simsd.models.quantized import converter, is_matrix, is_quantized, quantization


def read_config(folder: Path, family: Family | None = None) -> tuple[Family, PreTrainedConfig]:
    """The checkpoint's family, unless the caller says which, and its configuration."""
    fields = read_json(folder / "config.json")
    family = family or families.of_checkpoint(str(folder), fields)
    return family, weights.make_config(str(folder), f"{folder}/config.json", family, fields, str(folder))


def own_dtype(folder: Path, config: PreTrainedConfig) -> torch.dtype:
    """The dtype that transformers loads the checkpoint in: its configuration's, else that of its first tensor."""
    dtype = config.dtype
    if dtype is None:
        stored = weight_files.headers(weight_files.find_files(folder, config)[:1], _is_quantized(config))
        dtypes = weight_files.STORED.values()
        dtype = next((one.dtype for one in stored.values() if one.dtype in dtypes), None)
    if dtype not in weight_files.STORED.values():
        raise SimsdError(f"{folder}: a model cannot run in its dtype {dtype}: pass dtype=, for example 'bfloat16'")
    return dtype


def method(folder: Path, config: PreTrainedConfig) -> str | None:
    """How torchao stored the checkpoint's weights, as `load(quantize=)` calls it; None: it did not."""
    if not _is_quantized(config):
        return None
    files = weight_files.find_files(folder, config)
    weight_files.headers(files, quantized=True)  # that they are sound
    return quantization().method_in(str(folder), weight_files.metadata(files))


def _is_quantized(config: PreTrainedConfig) -> bool:
    return getattr(config, "quantization_config", None) is not None  # other methods than torchao's were refused


def load_model(
    folder: Path, config: PreTrainedConfig, quantize: str | None, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Reads the checkpoint into `dtype`, whatever its tensors are stored in, on `device`. Nothing is left random.

    Besides the model it takes a few MiB: each part of a tensor goes from the file to where it stays. Other matrices to
    `quantize` than in int8 have to be whole before they are.
    """
    source, generation_config = str(folder), _generation_config(folder)
    files = weight_files.find_files(folder, config)
    stored = weight_files.headers(files, _is_quantized(config))
    joined = iter
    if _is_quantized(config):  # the files have the parts of torchao's weights
        joined = functools.partial(quantization().joined, source, weight_files.metadata(files))
    model = weights.skeleton(source, config)
    empty = {name: torch.empty(one.shape, dtype=one.dtype, device="meta") for name, one in stored.items()}
    if scalars := [name for name, tensor in empty.items() if not tensor.dim()]:
        raise SimsdError(f"{source}: tensors without dimensions: {weights.listing(scalars)}")
    parts = {name: weights.parts(source, config, name, tensor) for name, tensor in joined(empty.items())}
    ours = dict(itertools.chain(*parts.values()))
    weights.check_shapes(source, model, {name: list(tensor.shape) for name, tensor in ours.items()})
    quantized = {name for name, part in ours.items() if is_quantized(part)}
    matrices = {name for name in ours if quantize is not None and is_matrix(name)} - quantized
    int8 = matrices if quantize == "int8" else set()
    # What has to be whole before the model can hold it: other matrices to quantize, and parts of quantized ones.
    whole = {name: ours[name].to(dtype) for name in matrices - int8}
    tensors = weights.allocate(model, ours, dtype, device, without=quantized | whole.keys(), int8=int8)
    scales = {
        name: torch.empty(*x.shape[:-1], 1, device=device) for name, x in tensors.items() if x.dtype == torch.int8
    }
    places, scale_places = (weights.by_source_name(values, ours) for values in (tensors, scales))
    whole |= {name: tensor for name, tensor in empty.items() if name not in parts}
    contents = {
        name: [(mine, len(part)) for mine, part in parts.get(name, [(name, tensor)])] for name, tensor in empty.items()
    }
    known = places.keys() | whole.keys()
    contents = {name: found for name, found in contents.items() if known.issuperset(mine for mine, _ in found)}

    def put(name: str, first: int, rows: Tensor) -> None:
        place = places[name].narrow(0, first, len(rows))
        if name not in scale_places:
            place.copy_(rows)  # casts, and moves to the device
        else:
            scales_of_rows = scale_places[name].narrow(0, first, len(rows))
            quantization().quantize_rows(rows.to(device, dtype), place, scales_of_rows)

    convert = converter(source, quantize, dtype, device)
    for name, tensor in joined(_read(weight_files.read(stored, contents), put, whole, device)):
        found = weights.parts(source, config, name, tensor) if is_quantized(tensor) else [(name, tensor)]
        tensors |= {mine: convert(mine, part) for mine, part in found}
    tensors |= {name: quantization().with_row_scales(tensors[name], scales[name], dtype) for name in scales}
    model = weights.assemble(model, tensors)
    if generation_config is not None:
        model.generation_config = generation_config
    return model


def _read(
    parts: Iterable[tuple[str, int, Tensor]],
    put: Callable[[str, int, Tensor], None],
    whole: Mapping[str, Tensor],
    device: torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors that are like those in `whole` when all their rows are there; `put` takes those of others."""
    memory: dict[str, Tensor] = {}
    for name, first, rows in parts:
        if name not in whole:
            put(name, first, rows)
            continue
        if first == 0:
            memory[name] = torch.empty_like(whole[name], device=device)
        memory[name].narrow(0, first, len(rows)).copy_(rows)
        if first + len(rows) == len(whole[name]):
            yield name, memory.pop(name)


def _generation_config(folder: Path) -> GenerationConfig | None:
    file = folder / "generation_config.json"
    fields = read_json(file) if file.exists() else None
    try:
        return None if fields is None else GenerationConfig.from_dict(fields)
    except Exception as error:  # whatever an odd value leads to in transformers
        raise SimsdError(f"{file} is not valid: {one_line(error)}") from error
