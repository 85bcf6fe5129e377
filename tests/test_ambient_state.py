"""What surrounds a call - autocast, default dtype and device, inference mode - does not show in any op's result."""

from __future__ import annotations

import contextlib
import pathlib
import sys

import pytest
import torch

from backends import BACKENDS
from simsd_kernels import dispatch

sys.path.insert(0, str(pathlib.Path(__file__).parent / "gpu"))
from gpu_cases import OPS, Op, call, on, same_bits  # noqa: E402

CPU = torch.device("cpu")


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic_algorithms():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


SURROUNDINGS = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic algorithms": deterministic_algorithms,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS, ids=str)
def test_an_op_gives_the_same_bits_whatever_surrounds_the_call(op: Op, backend: str):
    if obstacle := dispatch.device_obstacle(backend, op.name, CPU):
        pytest.skip(obstacle)
    slow = op.name == "verify_graph" and backend == "reference"
    for seed in (5, 7) if slow else range(4):
        made = op.make(seed)
        expected = call(op, on(CPU, made), backend)
        for surrounding, enter in SURROUNDINGS.items():
            given = on(CPU, made)
            with enter():
                got = call(op, given, backend)
            assert [x.dtype for x in got] == [x.dtype for x in expected], surrounding
            assert all(x.device == CPU for x in got) and same_bits(got, expected), surrounding
