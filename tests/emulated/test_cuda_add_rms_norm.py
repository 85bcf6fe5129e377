"""The CUDA kernel of add_rms_norm, run on the CPU, against transformers' modules."""

from __future__ import annotations

import json

import pytest
import torch

from test_add_rms_norm import FLOATS, assert_as_modules, copied, random_case, run

# Whole units of 16 bytes and broken ones; rows of a warp, of 4 and of 8, held and read again.
DIMS = (1, 5, 33, 64, 160, 255, 256, 257, 512, 600, 1024, 1030, 2048, 2056, 4096, 5120, 8192, 8193, 9000)


def relaid(made: dict, pick) -> dict:
    """Some tensors lie otherwise in memory, so that the 16-byte path is taken by some cases and not by others."""
    residual, x = made["residual"], made["x"]
    if residual.dim() > 2 and pick(False, True):
        made["residual"] = residual.transpose(0, 1).contiguous().transpose(0, 1)
    if pick(False, False, True):  # rows that begin 2 or 4 bytes past a multiple of 16
        made["residual"] = torch.zeros_like(torch.nn.functional.pad(residual, (1, 0)))[..., 1:].copy_(residual)
    if x is not None and pick(False, False, True):
        made["x"] = torch.stack((x, x), -1)[..., 1]
    if x is not None and x.dim() > 1 and pick(False, False, True):
        made["x"] = x[:1].expand_as(x)
    if pick(False, False, True):
        made["weight"] = torch.stack((made["weight"], made["weight"]), -1)[:, 1]
    return made


@pytest.mark.parametrize("seed", range(320))
def test_rows_are_added_and_normed(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    dim = pick(*DIMS)
    shape = pick((), (0,), (1,), (2, 2)) if dim > 2048 else pick((), (0,), (1,), (7,), (2, 3), (2, 1, 4), (3, 2, 2))
    made = random_case(shape, dim, pick(*FLOATS), pick(True, True, False), seed)
    made["eps"] = pick(0.0, 1e-6, 1e-6, 1e-5, 0.5)
    made["residual"] *= pick(1, 1, 1e-3, 100)
    made = relaid(made, pick)
    before, on_cpu = copied(made), copied(made)
    out = run(made, "cuda")
    assert_as_modules(out, made["residual"], before)
    assert_as_modules(out, made["residual"], before, (run(on_cpu, "cpu"), on_cpu["residual"]))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim", [160, 512, 1024, 4096, 8192, 9216])
def test_alignment_does_not_change_a_bit(dtype, dim):
    made = random_case((3,), dim, dtype)
    off = copied(made)
    off["residual"] = torch.zeros(3, dim + 1, dtype=dtype)[:, 1:].copy_(made["residual"])
    off["x"] = torch.stack((made["x"], made["x"]), -1)[..., 0]
    assert torch.equal(run(made, "cuda"), run(off, "cuda")) and torch.equal(made["residual"], off["residual"])


def counted(made: dict) -> dict:
    torch.ops.simsd_emulated.take_counters()
    run(made, "cuda")
    return json.loads(torch.ops.simsd_emulated.take_counters())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dim, rereads", [(160, 0), (512, 0), (1024, 0), (4096, 0), (16384, 1)])
def test_one_launch_reads_every_row_once_and_only_long_ones_twice(dtype, dim, rereads):
    made = random_case((5,), dim, dtype)
    row = dim * dtype.itemsize
    counters = counted(made)
    assert counters["launches"] == 1
    assert counters["loaded_bytes"] == 5 * (3 + rereads) * row  # x, residual, weight
    assert counted(made | {"x": None})["loaded_bytes"] == 5 * (2 + rereads) * row
