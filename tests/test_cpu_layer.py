"""The row loops of csrc/cpu/layer: right, and the same whatever rides along, on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from backends import needs_compiled_ops

SCRIPT = """
import sys, torch
from simsd_kernels import add_rms_norm, combine_experts, silu_mul
assert torch.ops.simsd._cpu_capability() == sys.argv[1]
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    close = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-30 if dtype == torch.float32 else 1e-7}
    if dtype != torch.float32:
        # Every 16-bit number added to some other: what is read and what is rounded takes every form.
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[:, None]
        x, residual = every[torch.randperm(2**16)], every.clone()
        add_rms_norm(x, residual, torch.ones(1, dtype=dtype), backend="cpu")
        torch.testing.assert_close(residual, every + x, rtol=0, atol=0, equal_nan=True)
    for dim in (1, 3, 16, 33, 160, 1030):
        x, residual, weight = torch.randn(9, dim).to(dtype), torch.randn(9, dim).to(dtype), torch.randn(dim).to(dtype)
        summed = residual.clone()
        out = add_rms_norm(x, summed, weight, backend="cpu")
        assert torch.equal(summed, residual + x)
        torch.testing.assert_close(out, add_rms_norm(None, summed, weight, backend="reference"), **close)
        for row in range(9):
            assert torch.equal(add_rms_norm(x[row:], residual[row:].clone(), weight, backend="cpu"), out[row:])
    gate, up = (3 * torch.randn(2, 77)).to(dtype)
    out = silu_mul(torch.cat((gate, up)), backend="cpu")
    torch.testing.assert_close(out, silu_mul(torch.cat((gate, up)), backend="reference"), **close)
    for first in range(77):
        assert torch.equal(silu_mul(torch.cat((gate[first:], up[first:])), backend="cpu"), out[first:])
    y, weights, places = torch.randn(12, 77).to(dtype), torch.rand(4, 3).to(dtype), torch.randperm(12).view(4, 3).int()
    out = combine_experts(y, weights, places, backend="cpu")
    expected = combine_experts(y, weights, places, backend="reference")
    torch.testing.assert_close(out, expected, rtol=0, atol=close["rtol"])
    for first in range(77):
        assert torch.equal(combine_experts(y[:, first:], weights[2:], places[2:], backend="cpu"), out[2:, first:])
"""


@needs_compiled_ops
@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512"])
def test_every_instruction_set_is_right_and_keeps_rows_apart(capability):
    known = ["portable", "avx2", "avx512"]
    if known.index(capability) > known.index(torch.ops.simsd._cpu_capability()):
        pytest.skip(f"this machine has no {capability}")
    environment = os.environ | {"SIMSD_CPU_CAPABILITY": capability}
    subprocess.run([sys.executable, "-c", SCRIPT, capability], env=environment, check=True)
