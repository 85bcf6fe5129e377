"""The Triton kernel of silu_mul, interpreted, against transformers' module."""

from __future__ import annotations

import pytest
import torch

from test_silu_mul import FLOATS, assert_as_module, random_case, run


@pytest.mark.parametrize("seed", range(60))
def test_gates_are_activated_and_multiplied(seed):
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    shape, size = pick((), (0,), (1,), (7,), (2, 3), (2, 1, 4)), pick(1, 2, 5, 33, 448, 1024, 1025, 2500)
    gate_up = random_case(shape, size, pick(*FLOATS), seed)
    if pick(False, True):
        gate_up = torch.nn.functional.pad(gate_up, (3, 2))[..., 3:-2]
    if len(shape) > 1 and pick(False, True):
        gate_up = gate_up.transpose(0, 1).contiguous().transpose(0, 1)
    if pick(False, True):
        gate_up = torch.stack((gate_up, gate_up), -1)[..., 1]
    assert_as_module(run(gate_up, "triton"), gate_up)


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_element_does_not_notice_its_place_and_company(dtype):
    gate, up = random_case((), 1500, dtype).chunk(2)
    whole = run(torch.cat((gate, up)), "triton")
    for first, last in ((0, 1), (1, 1500), (1023, 1025), (700, 1300)):
        assert torch.equal(run(torch.cat((gate[first:last], up[first:last])), "triton"), whole[first:last])
    gate[7], gate[9], up[11] = float("nan"), float("inf"), float("nan")
    out = run(torch.cat((gate, up)), "triton")
    kept = [i for i in range(1500) if i not in (7, 9, 11)]
    assert torch.equal(out[kept], whole[kept]) and out[[7, 11]].isnan().all()


def test_every_gate_of_float32_is_served_to_some_units_in_the_last_place():
    sizes = torch.logspace(-40, 38, 2001)
    gate = torch.cat((torch.linspace(-104, 104, 20001), sizes, -sizes))
    out = run(torch.cat((gate, torch.ones_like(gate))), "triton")
    wide = gate.double()
    exact = wide / (1 + (-wide).exp())
    assert ((out.double() - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact.abs() + 1e-35).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_limits_are_sensible(dtype):
    gate = torch.tensor([float("inf"), -float("inf"), float("nan"), torch.finfo(dtype).min, -0.0], dtype=dtype)
    out = run(torch.cat((gate, torch.ones_like(gate))), "triton")
    assert out[0] == float("inf") and out[2].isnan() and not out[[1, 3, 4]].any()


def test_float64_is_refused_by_name():
    with pytest.raises(RuntimeError, match="triton: supports float32, bfloat16 and float16, got torch.float64"):
        run(random_case().double(), "triton")
