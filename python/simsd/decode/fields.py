"""Named per-slot fields in one packed buffer: what crosses between host and device crosses in one copy."""

from __future__ import annotations

import ctypes
import itertools
import math
import struct
from collections.abc import Mapping

import torch
from torch import Tensor

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
_ROW_ALIGNMENT = 8  # bytes: the widest field is int64
_CODES = {torch.int64: "q", torch.int32: "i", torch.float32: "f"}  # of module struct


class Fields:
    """`count` rows of fields; each field is a view [count, *shape] of `buffer`, by its name in `views`.

    Values are packed by Python, not by a tensor each: a row has dozens of fields of a few bytes.

    Attributes:
        buffer: uint8 [count, bytes].
    """

    def __init__(self, layout: Layout, count: int, device: torch.device | str, pinned: bool = False) -> None:
        widest_first = sorted(layout.items(), key=lambda field: -field[1][0].itemsize)
        self._names = [name for name, _ in widest_first]
        self._format = ""
        places, width = {}, 0
        for name, (dtype, shape) in widest_first:
            size = math.prod(shape)
            places[name] = width, width + size * dtype.itemsize
            width += size * dtype.itemsize
            self._format += f"{size}{_CODES[dtype]}"
        padding = -width % _ROW_ALIGNMENT
        self._format += f"{padding}x"
        self.buffer = torch.zeros((count, width + padding), dtype=torch.uint8, device=device, pin_memory=pinned)
        self._memory: memoryview | None = None  # of a buffer in the host's memory: a tensor's copy takes longer
        if self.buffer.device.type == "cpu":
            bytes_of_it = (ctypes.c_char * self.buffer.numel()).from_address(self.buffer.data_ptr())
            self._memory = memoryview(bytes_of_it).cast("B")
        self.views: dict[str, Tensor] = {}
        for name, (dtype, shape) in layout.items():
            first, end = places[name]
            self.views[name] = self.buffer[:, first:end].view(dtype).unflatten(1, shape or (1,))
            if not shape:
                self.views[name] = self.views[name].squeeze(1)

    def write(self, columns: Mapping[str, list]) -> None:
        """Sets every field, none of which has a shape, from a list of one value per row; of fields in the host's
        memory."""
        values = itertools.chain.from_iterable(zip(*(columns[name] for name in self._names), strict=True))
        self._memory[:] = struct.pack("=" + self._format * len(self.buffer), *values)

    def write_row(self, row: int, values: Mapping[str, object]) -> None:
        """Sets every field of a row: a value, or as many in a tuple or list as the field has."""
        flat: list = []
        for name in self._names:
            value = values[name]
            flat.extend(value) if isinstance(value, tuple | list) else flat.append(value)
        packed, width = struct.pack("=" + self._format, *flat), self.buffer.shape[1]
        if self._memory is not None:
            self._memory[row * width : (row + 1) * width] = packed
            return
        self.buffer[row].copy_(torch.frombuffer(bytearray(packed), dtype=torch.uint8).pin_memory(), non_blocking=True)

    def copy(self, other: Fields) -> None:
        self.buffer.copy_(other.buffer, non_blocking=True)
