"""Checkpoint folders in Hugging Face format: found, checked, read."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path, PurePath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from simsd.errors import NotFoundError, SimsdError, one_line
from simsd.models import families, weights
from simsd.models.families import Family
from simsd.models.quantized import converter, is_quantized, quantization

BUILT_IN = ("tiny-target", "tiny-draft")
PAIR = Path(__file__).parents[1] / "pair"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# With the tokenizer's files: Qwen2's slow ones are vocab.json, merges.txt and added_tokens.json.
_DOWNLOADED = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt", "tokenizer.model")
# safetensors' names of the dtypes that weights may be stored in.
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_STORED = _FLOATS | {"I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn}


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
        return Path(snapshot_download(hub_id, allow_patterns=list(_DOWNLOADED)))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise NotFoundError(f"{hub_id!r} is no local folder and cannot be had from the hub: {reason}") from error


def read_config(folder: Path, family: Family | None = None) -> tuple[Family, PreTrainedConfig]:
    """The checkpoint's family, unless the caller says which, and its configuration."""
    fields = read_json(folder / "config.json")
    family = family or families.of_checkpoint(str(folder), fields)
    return family, weights.make_config(str(folder), f"{folder}/config.json", family, fields, str(folder))


def own_dtype(folder: Path, config: PreTrainedConfig) -> torch.dtype:
    """The dtype that transformers loads the checkpoint in: its configuration's, else that of its first tensor."""
    dtype = config.dtype
    if dtype is None:
        stored = _headers(_weight_files(folder, config)[:1], _is_by_torchao(config))
        dtype = next((_FLOATS[kind] for kind, _ in stored.values() if kind in _FLOATS), None)
    if dtype not in _FLOATS.values():
        raise SimsdError(f"{folder}: a model cannot run in its dtype {dtype}: pass dtype=, for example 'bfloat16'")
    return dtype


def method(folder: Path, config: PreTrainedConfig) -> str | None:
    """How torchao stored the checkpoint's weights, as `load(quantize=)` calls it; None: it did not."""
    if not _is_by_torchao(config):
        return None
    return quantization().method_in(str(folder), _metadata(_weight_files(folder, config)))


def load_model(
    folder: Path, config: PreTrainedConfig, quantize: str | None, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Reads the checkpoint into `dtype`, whatever its tensors are stored in, on `device`, and quantizes each weight as
    it comes. Nothing is left random."""
    source, files, generation_config = str(folder), _weight_files(folder, config), _generation_config(folder)
    headers, joined = _headers(files, _is_by_torchao(config)), iter
    if _is_by_torchao(config):
        joined = functools.partial(quantization().joined, source, _metadata(files))
    model = weights.skeleton(source, config)
    empty = ((name, torch.empty(shape, dtype=_STORED[kind], device="meta")) for name, (kind, shape) in headers.items())
    shapes = {
        ours: list(part.shape)
        for name, tensor in joined(empty)
        for ours, part in weights.parts(source, config, name, tensor)
    }
    weights.check_shapes(source, model, shapes)
    full = {name for name, _ in model.named_buffers()}  # what a router adds to its scores is small beside them
    tensors: dict[str, Tensor] = {}
    convert = converter(source, quantize, dtype, device)
    for name, tensor in joined(_tensors(files, device)):
        for ours, part in weights.parts(source, config, name, tensor):
            if not is_quantized(part):
                # A copy: on the CPU the tensor is the mapped file, which may be written to later (save_pretrained).
                part = part.to(torch.float32 if ours in full else dtype, copy=tensor.device.type == "cpu")
            tensors[ours] = convert(ours, part)
    model = weights.assemble(model, tensors)
    if generation_config is not None:
        model.generation_config = generation_config
    return model


def _generation_config(folder: Path) -> GenerationConfig | None:
    file = folder / "generation_config.json"
    fields = read_json(file) if file.exists() else None
    try:
        return None if fields is None else GenerationConfig.from_dict(fields)
    except Exception as error:  # as in `read_config`
        raise SimsdError(f"{file} is not valid: {one_line(error)}") from error


def _weight_files(folder: Path, config: PreTrainedConfig) -> list[Path]:
    """The files that transformers reads: the one that the configuration names, else the whole one, else the shards."""
    if (folder / "adapter_config.json").exists():
        raise SimsdError(f"{folder} holds an adapter (adapter_config.json): merge it into its model first")
    named = getattr(config, "transformers_weights", None)
    if named is not None:
        file = _inside(folder / "config.json", named)
        if not file.exists():
            raise NotFoundError(f"{folder} has no {named}, the weights that its configuration names")
        return _shards(file) if named.endswith(".index.json") else [file]
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).exists():
        return _shards(folder / _INDEX)
    raise NotFoundError(f"{folder} has neither {_WEIGHTS} nor {_INDEX}: only safetensors checkpoints are read")


def _shards(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise SimsdError(f"{index} must hold a weight_map from tensors to files, got {places!r:.80}")
    files = sorted({_inside(index, name) for name in places.values()})
    if missing := [file.name for file in files if not file.exists()]:
        raise NotFoundError(f"{index.parent}: of {len(files)} weight files are missing: {weights.listing(missing)}")
    return files


def _inside(source: Path, name: object) -> Path:
    """The weight file that `source` names, which must be in its folder."""
    path = PurePath(name) if isinstance(name, str) else PurePath()
    if path.is_absolute() or not path.name or ".." in path.parts:
        raise SimsdError(f"{source} must name weight files in its own folder, got {name!r}")
    return source.parent / path


def _tensors(files: list[Path], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    for file in files:
        with safe_open(file, framework="pt", device=str(device)) as opened:
            yield from ((name, opened.get_tensor(name)) for name in opened.keys())  # noqa: SIM118 (not a dict)


def _is_by_torchao(config: PreTrainedConfig) -> bool:
    return getattr(config, "quantization_config", None) is not None  # of another method: `check_config` refuses it


def _metadata(files: list[Path]) -> dict[str, str]:
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found |= opened.metadata() or {}
    return found


def _headers(files: list[Path], by_torchao: bool = False) -> dict[str, tuple[str, list[int]]]:
    """Name -> dtype, as safetensors calls it, and shape of every tensor in `files`; dtypes of quantized values only
    where torchao stored them."""
    headers: dict[str, tuple[str, list[int]]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
                found = {name: (part.get_dtype(), list(part.get_shape())) for name, part in slices.items()}
        except (SafetensorError, OSError) as error:
            raise SimsdError(f"{file} is truncated or damaged ({one_line(error)}): fetch it again") from error
        if twice := [name for name in found if name in headers]:
            raise SimsdError(f"{file} holds tensors that another file also holds: {weights.listing(twice)}")
        kinds = _STORED if by_torchao else _FLOATS
        if other := [f"{name} is {kind}" for name, (kind, _) in found.items() if kind not in kinds]:
            raise SimsdError(f"{file}: quantized or integer weights are not read: {weights.listing(other)}")
        headers |= found
    return headers


def read_json(file: Path) -> dict:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"{file.parent} has no {file.name}: not a checkpoint in Hugging Face format") from None
    except (ValueError, OSError) as error:
        raise SimsdError(f"{file} cannot be read as JSON: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise SimsdError(f"{file} must hold a JSON object, got {type(value).__name__}")
    return value
