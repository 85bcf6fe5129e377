"""Checkpoint folders in Hugging Face format: checked, and read into a model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from simsd.errors import SimsdError, one_line
from simsd.models import families, weight_files, weights
from simsd.models.families import Family
from simsd.models.folders import read_json


def read_config(folder: Path, family: Family | None = None) -> tuple[Family, PreTrainedConfig]:
    """The checkpoint's family, unless the caller says which, and its configuration."""
    fields = read_json(folder / "config.json")
    family = family or families.of_checkpoint(str(folder), fields)
    return family, weights.make_config(str(folder), f"{folder}/config.json", family, fields, str(folder))


def own_dtype(folder: Path, config: PreTrainedConfig) -> torch.dtype:
    """The dtype that transformers loads the checkpoint in: its configuration's, else that of its first tensor."""
    dtype = config.dtype
    if dtype is None:
        stored = weight_files.headers(weight_files.find_files(folder, config)[:1])
        dtype = next((one.dtype for one in stored.values()), None)
    if dtype not in weight_files.STORED.values():
        raise SimsdError(f"{folder}: a model cannot run in its dtype {dtype}: pass dtype=, for example 'bfloat16'")
    return dtype


def load_model(folder: Path, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Reads the checkpoint into `dtype`, whatever its tensors are stored in, on `device`. Nothing is left random.

    Besides the model it takes a few MiB: each part of a tensor goes from the file to where it stays.
    """
    source, generation_config = str(folder), _generation_config(folder)
    stored = weight_files.headers(weight_files.find_files(folder, config))
    model = weights.skeleton(source, config)
    parts = {
        name: weights.parts(source, config, name, torch.empty(one.shape, device="meta")) for name, one in stored.items()
    }
    shapes = {ours: list(part.shape) for found in parts.values() for ours, part in found}
    weights.check_shapes(source, model, shapes)
    tensors = weights.allocate(model, shapes, dtype, device)
    places = weights.by_source_name(tensors, shapes)
    contents = {
        name: [(ours, len(part)) for ours, part in found]
        for name, found in parts.items()
        if all(ours in places for ours, _ in found)
    }
    for name, first, rows in weight_files.read(stored, contents):
        places[name].narrow(0, first, len(rows)).copy_(rows)  # casts, and moves to the device
    model = weights.assemble(model, tensors)
    if generation_config is not None:
        model.generation_config = generation_config
    return model


def _generation_config(folder: Path) -> GenerationConfig | None:
    file = folder / "generation_config.json"
    fields = read_json(file) if file.exists() else None
    try:
        return None if fields is None else GenerationConfig.from_dict(fields)
    except Exception as error:  # whatever an odd value leads to in transformers
        raise SimsdError(f"{file} is not valid: {one_line(error)}") from error
