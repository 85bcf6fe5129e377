"""Every op with what all are tested with: its suite has random arguments, what is refused, what are lanes."""

from __future__ import annotations

import dataclasses
import importlib
from types import ModuleType

import pytest
import torch

import simsd_kernels
from backends import written
from simsd_kernels import dispatch
from simsd_kernels.ops import SCHEMAS


@dataclasses.dataclass(frozen=True)
class Op:
    """An op and its arguments, as its suite has them.

    random_arguments(seed), good_arguments(): keyword arguments on the CPU.
    REFUSED: (name, value, error, message) of bad input, in the place of a good argument.
    LANES: arguments whose first dimension runs over what must not depend on each other; none where it all does.
    lane_alone(arguments, lane): the arguments of that lane alone, where they are not LANES cut to it.
    """

    name: str
    suite: ModuleType

    def __str__(self) -> str:
        return self.name

    @property
    def function(self):
        return getattr(simsd_kernels, self.name)

    @property
    def overload(self):
        return dispatch.overload("simsd", self.name)

    @property
    def changed(self) -> tuple[str, ...]:
        return written(self.name)

    @property
    def lanes(self) -> tuple[str, ...]:
        return self.suite.LANES

    @property
    def refused(self) -> list:
        return self.suite.REFUSED

    def make(self, seed: int) -> dict:
        return self.suite.random_arguments(seed)

    def good(self) -> dict:
        return self.suite.good_arguments()

    def lane_alone(self, made: dict, lane: int) -> dict:
        if hasattr(self.suite, "lane_alone"):
            return self.suite.lane_alone(made, lane)
        return {n: v[lane : lane + 1] if n in self.lanes and torch.is_tensor(v) else v for n, v in made.items()}


OPS = [Op(name, importlib.import_module(f"test_{name}")) for name in SCHEMAS]


def on(device: torch.device, made: dict) -> dict:
    """Arguments of their own on `device`."""
    return {name: value.clone().to(device) if torch.is_tensor(value) else value for name, value in made.items()}


def call(op: Op, made: dict, backend: str | None) -> tuple[torch.Tensor, ...]:
    """Outputs, then the arguments written in place; skips, saying why, where the backend does not serve such a call."""
    try:
        out = op.function(**made, backend=backend)
    except RuntimeError as error:
        if "cannot serve this call" not in str(error):
            raise
        lines = [line.strip() for line in str(error).splitlines()]
        pytest.skip(f"{op.name}: {next((line for line in lines if line.startswith(f'{backend}:')), lines[0])}")
    return outputs(out) + tuple(made[name] for name in op.changed)


def outputs(out) -> tuple[torch.Tensor, ...]:
    return (out,) if torch.is_tensor(out) else tuple(out or ())


def same_bits(out: tuple, expected: tuple) -> bool:
    """Alike to the last bit, NaN included."""
    return all(
        a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip((x[..., None] for x in out), (x[..., None] for x in expected), strict=True)
    )
