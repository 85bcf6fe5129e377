"""Checkpoint folders in Hugging Face format: found, checked, read."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from simsd.errors import NotFoundError, SimsdError
from simsd.models import weights
from simsd.models.weights import Config

BUILT_IN = ("tiny-target", "tiny-draft")
PAIR = Path(__file__).parents[1] / "pair"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def find(source: str | Path) -> Path:
    """The folder of a built-in model's name, of a local path or of a hub id (downloaded where it is not cached)."""
    if source in BUILT_IN:
        folder = PAIR / str(source)
        if not folder.is_dir():
            raise NotFoundError(f"the built-in model {source} is not in this installation ({folder}): reinstall")
        return folder
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise SimsdError(f"{folder} is a file: give the checkpoint's folder")
    if isinstance(source, Path) or str(source).count("/") != 1 or str(source).startswith((".", "~", "/")):
        raise NotFoundError(f"no checkpoint {str(source)!r}: not a folder, nor {' or '.join(BUILT_IN)}, nor a hub id")
    return _download(str(source))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.jinja", "merges.txt"]))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotFoundError(f"{hub_id!r} is no local folder and cannot be had from the hub: {reason}") from error


def read_config(folder: Path) -> Config:
    """SDARConfig or SDARMoeConfig of the checkpoint."""
    fields = read_json(folder / "config.json")
    model_type = fields.get("model_type")
    if model_type not in weights.MODEL_CLASSES:
        raise SimsdError(
            f"{folder}: model_type {model_type!r} is not supported: {' or '.join(weights.MODEL_CLASSES)} is"
        )
    if fields.get("quantization_config"):
        raise SimsdError(f"{folder}: quantized checkpoints are not supported")
    try:
        config = weights.MODEL_CLASSES[model_type][0].from_dict(fields, name_or_path=str(folder))
    except Exception as error:  # transformers' validation has a type of its own for each kind of mistake
        raise SimsdError(f"{folder}/config.json is not valid: {_first_line(error)}") from error
    return config


def load_model(folder: Path, config: Config, dtype: torch.dtype | None, device: torch.device) -> PreTrainedModel:
    """Reads the checkpoint into `dtype` (None: the checkpoint's) on `device`. Nothing is left random."""
    files = _weight_files(folder)
    shapes: dict[str, list[int]] = {}
    for file in files:
        shapes |= _shapes(file)
    model = weights.skeleton(config)
    weights.check_shapes(str(folder), model, shapes)
    tensors: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                tensor = opened.get_tensor(name)
                # A copy: on the CPU the tensor is the mapped file, which may be written to later (save_pretrained).
                tensors[name] = tensor.to(dtype or tensor.dtype, copy=tensor.device.type == "cpu")
    model = weights.assemble(model, tensors)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_dict(read_json(folder / "generation_config.json"))
    return model


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).exists():
        index = read_json(folder / _INDEX)
        names = sorted(set(index.get("weight_map", {}).values()))
        if not names:
            raise SimsdError(f"{folder / _INDEX} lists no weights")
        if missing := [name for name in names if not (folder / name).exists()]:
            raise NotFoundError(f"{folder}: of {len(names)} weight files are missing: {', '.join(missing)}")
        return [folder / name for name in names]
    if not (folder / _WEIGHTS).exists():
        raise NotFoundError(f"{folder} has neither {_WEIGHTS} nor {_INDEX}: only safetensors checkpoints are read")
    return [folder / _WEIGHTS]


def _shapes(file: Path) -> dict[str, list[int]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise SimsdError(f"{file} is truncated or damaged ({_first_line(error)}): fetch it again") from error


def read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"{file.parent} has no {file.name}: not a checkpoint in Hugging Face format") from None
    except (ValueError, OSError) as error:
        raise SimsdError(f"{file} cannot be read as JSON: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise SimsdError(f"{file} must hold a JSON object, got {type(value).__name__}")
    return value


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
