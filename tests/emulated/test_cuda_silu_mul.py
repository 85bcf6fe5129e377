"""The CUDA kernel of silu_mul, run on the CPU, against transformers' module."""

from __future__ import annotations

import json

import pytest
import torch

from test_silu_mul import FLOATS, assert_as_module, random_case, run


@pytest.mark.parametrize("seed", range(320))
def test_gates_are_activated_and_multiplied(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    shape = pick((), (0,), (1,), (7,), (2, 3), (2, 1, 4), (3, 2, 2))
    gate_up = random_case(shape, pick(1, 3, 8, 33, 64, 448, 512, 1024, 1025, 2050, 3072), pick(*FLOATS), seed)
    gate_up *= pick(1, 1, 1e-3, 20)
    if len(shape) > 1 and pick(False, True):
        gate_up = gate_up.transpose(0, 1).contiguous().transpose(0, 1)
    if pick(False, False, True):  # rows that begin 2 or 4 bytes past a multiple of 16
        gate_up = torch.nn.functional.pad(gate_up, (1, 0))[..., 1:]
    if pick(False, False, True):
        gate_up = torch.stack((gate_up, gate_up), -1)[..., 1]
    assert_as_module(run(gate_up, "cuda"), gate_up)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [64, 1024, 1040])
def test_alignment_does_not_change_a_bit(dtype, size):
    gate_up = random_case((3,), size, dtype)
    off = torch.nn.functional.pad(gate_up, (1, 0))[:, 1:]
    assert torch.equal(run(gate_up, "cuda"), run(off, "cuda"))


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_launch_reads_everything_once(dtype):
    gate_up = random_case((5,), 1552, dtype)
    torch.ops.simsd_emulated.take_counters()
    run(gate_up, "cuda")
    counters = json.loads(torch.ops.simsd_emulated.take_counters())
    assert counters["launches"] == 1 and counters["loaded_bytes"] == gate_up.numel() * dtype.itemsize
