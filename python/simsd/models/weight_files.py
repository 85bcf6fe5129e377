"""The safetensors files of a checkpoint: which they are, what is in them, and their tensors part by part."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePath

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import logging

from simsd.errors import NotFoundError, SimsdError, one_line
from simsd.models.folders import read_json
from simsd.models.weights import listing

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# safetensors' names of the dtypes that weights may be stored in.
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# And those of quantized values.
_QUANTIZED = {"I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn}
_PART_BYTES = 16 << 20  # of a tensor in memory besides the model
_QUIET_SECONDS = 1.0  # before a progress bar is shown


def find_files(folder: Path, config: PreTrainedConfig) -> list[Path]:
    """The files that transformers reads: the one that the configuration names, else the whole one, else the shards."""
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
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickled:
        raise NotFoundError(
            f"{folder} has its weights in {listing(pickled)}, whose format can run code: only safetensors are read;"
            " convert it once by transformers' from_pretrained(...).save_pretrained(...), if you trust its source"
        )
    raise NotFoundError(f"{folder} has neither {_WEIGHTS} nor {_INDEX}: only safetensors checkpoints are read")


def _shards(index: Path) -> list[Path]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise SimsdError(f"{index} must hold a weight_map from tensors to files, got {places!r:.80}")
    files = sorted({_inside(index, name) for name in places.values()})
    if missing := [file.name for file in files if not file.exists()]:
        raise NotFoundError(f"{index.parent}: of {len(files)} weight files are missing: {listing(missing)}")
    return files


def _inside(source: Path, name: object) -> Path:
    """The weight file that `source` names, which must be in its folder."""
    path = PurePath(name) if isinstance(name, str) else PurePath()
    if path.is_absolute() or not path.name or ".." in path.parts:
        raise SimsdError(f"{source} must name weight files in its own folder, got {name!r}")
    return source.parent / path


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: its bytes begin at `begin`."""

    file: Path
    begin: int
    dtype: torch.dtype
    shape: list[int]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def metadata(files: list[Path]) -> dict[str, str]:
    """What the files, which are sound, say besides their tensors."""
    found = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found |= opened.metadata() or {}
    return found


def headers(files: list[Path], quantized: bool = False) -> dict[str, Stored]:
    """Every tensor in `files` by its name there. Raises SimsdError for a damaged file and for dtypes of no weights or,
    where they may be `quantized`, of no quantized ones."""
    kinds = STORED | _QUANTIZED if quantized else STORED
    every: dict[str, Stored] = {}
    for file in files:
        found = _header(file, kinds)
        if twice := [name for name in found if name in every]:
            raise SimsdError(f"{file} holds tensors that another file also holds: {listing(twice)}")
        every |= found
    return every


def _header(file: Path, kinds: Mapping[str, torch.dtype]) -> dict[str, Stored]:
    try:
        # It checks that the header is sound and nothing missing behind it; where a tensor begins it does not tell.
        with safe_open(file, framework="pt") as checked:
            names = list(checked.keys())
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            fields = json.loads(opened.read(size))
    except (SafetensorError, OSError) as error:
        raise SimsdError(f"{file} is truncated or damaged ({one_line(error)}): fetch it again") from error
    if other := [f"{name} is {kind}" for name in names if (kind := fields[name]["dtype"]) not in kinds]:
        raise SimsdError(f"{file}: quantized or integer weights are not read: {listing(other)}")
    found = {}
    for name in names:
        kind, begin = kinds[fields[name]["dtype"]], fields[name]["data_offsets"][0]
        found[name] = Stored(file, 8 + size + begin, kind, fields[name]["shape"])
    return found


def read(
    stored: Mapping[str, Stored], contents: Mapping[str, list[tuple[str, int]]]
) -> Iterator[tuple[str, int, Tensor]]:
    """The tensors of `stored` in parts of a few MiB, in the order of the files.

    Read, not mapped: of a mapped file every page that was touched counts as the process's memory. Where standard error
    is a terminal, a progress bar shows there if it takes long.

    Args:
        contents: what each tensor to read holds: (our name, rows), one below the other.

    Yields:
        Our name, the first row, and some rows [n, ...] as they are stored, in memory that the next part takes.
    """
    in_order = sorted((one.file, one.begin, name) for name, one in stored.items() if name in contents)
    total = sum(stored[name].bytes for _, _, name in in_order)
    largest = max((stored[name].row_bytes for _, _, name in in_order), default=0)
    buffer = memoryview(bytearray(max(_PART_BYTES, largest)))
    units = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    with logging.tqdm(
        desc="Loading weights", total=total, **units, disable=None, delay=_QUIET_SECONDS, leave=False
    ) as progress:
        for file, names in groupby(in_order, key=lambda place: place[0]):
            with file.open("rb") as opened:
                for _, begin, name in names:
                    opened.seek(begin)
                    for ours, rows in contents[name]:
                        for first, part in _rows(opened, stored[name], rows, buffer):
                            yield ours, first, part
                            progress.update(part.nbytes)


def _rows(opened, stored: Stored, rows: int, buffer: memoryview) -> Iterator[tuple[int, Tensor]]:
    """The next `rows` rows of the file, as many at a time as the buffer holds."""
    if not stored.bytes:
        return
    most = len(buffer) // stored.row_bytes
    for first in range(0, rows, most):
        count = min(most, rows - first)
        part = buffer[: count * stored.row_bytes]
        if opened.readinto(part) != len(part):
            raise SimsdError(f"{stored.file} became shorter while it was read: fetch it again")
        yield first, torch.frombuffer(part, dtype=stored.dtype).view(count, *stored.shape[1:])
