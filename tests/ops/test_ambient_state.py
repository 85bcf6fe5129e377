"""What surrounds a call - autocast, default dtype and device, inference mode - does not show in any op's result."""

from __future__ import annotations

import contextlib

import pytest
import torch

from backends import device_of, sized
from every_op import OPS, Op, call, on, same_bits


@contextlib.contextmanager
def switched(switch, before, to):
    switch(to)
    try:
        yield
    finally:
        switch(before)


def default_dtype(dtype: torch.dtype):
    return switched(torch.set_default_dtype, torch.get_default_dtype(), dtype)


def deterministic_algorithms():
    return switched(torch.use_deterministic_algorithms, torch.are_deterministic_algorithms_enabled(), True)


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


@pytest.mark.parametrize("op", OPS, ids=str)
def test_an_op_gives_the_same_bits_whatever_surrounds_the_call(op: Op, backend: str):
    slow = op.name == "verify_graph" and backend == "reference"
    for seed in (5, 7) if slow else range(sized(4, interpreted=1)):
        device, made = device_of(backend), sized(op.make(seed), interpreted=op.good())
        expected = call(op, on(device, made), backend)
        for surrounding, enter in SURROUNDINGS.items():
            given = on(device, made)
            with enter():
                got = call(op, given, backend)
            assert [x.dtype for x in got] == [x.dtype for x in expected], surrounding
            assert all(x.device.type == device.type for x in got) and same_bits(got, expected), surrounding
