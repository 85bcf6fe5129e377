"""silu(gate) * up: what transformers' MLP computes, rounded as it rounds, and no element notices another."""

from __future__ import annotations

import pytest
import torch

from arguments import Pick, relaid
from backends import FLOATS, backends, callable_of, each_dtype, kernels
from roundings import LEAST, UNITS, assert_within, roundings, times

run = callable_of("silu_mul")
LANES = ("gate_up",)
# I around the vectors' widths, and of real models.
SIZES = (1, 3, 8, 16, 33, 448, 1000, 3072)


def random_case(shape=(3, 5), size=100, dtype=torch.float32, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, 2 * size, generator=generator) * 4).to(dtype)


def good_arguments() -> dict:
    return {"gate_up": random_case()}


def random_arguments(seed: int) -> dict:
    pick = Pick(seed)
    shape = pick((), (0,), (1,), (7,), (40,), (2, 3), (3, 5), (2, 1, 4), (3, 2, 2), (2, 3, 4))
    size = pick(1, 2, 3, 5, 8, 33, 64, 128, 448, 512, 1024, 1025, 2050, 2500, 3072, 6001)
    gate_up = random_case(shape, size, pick(*FLOATS), seed) * pick(1, 1, 1e-3, 20)
    return {"gate_up": relaid(gate_up, pick)}


def module(gate_up: torch.Tensor) -> torch.Tensor:
    """As Qwen3MLP has it, between its products."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def assert_as_module(out: torch.Tensor, gate_up: torch.Tensor) -> None:
    """Where the module rounds it is rounded too, and to the same, unless silu(gate) lies next to a boundary."""
    gate, up = gate_up.chunk(2, dim=-1)
    exact = gate.double() / (1 + (-gate.double()).exp())
    allowed = times(roundings(exact, gate.dtype), up)
    for found in (out, module(gate_up)):
        assert_within(allowed, found)
    assert out.is_contiguous()


def test_golden_values(backend):
    gate = torch.tensor([0.0, 1.0, -1.0, 20.0, -20.0])
    out = run(torch.cat((gate, torch.tensor([7.0, 2.0, 2.0, 1.0, 1.0]))), backend=backend)
    expected = [0.0, 2 * 0.7310585786, -2 * 0.2689414214, 19.9999999588, -4.122307e-08]
    torch.testing.assert_close(out, torch.tensor(expected), rtol=3e-7, atol=0)


def test_gates_are_activated_and_multiplied(backend, seed):
    given = random_arguments(seed)
    assert_as_module(run(**given, backend=backend), **given)


def test_silu_is_rounded_before_it_is_multiplied(backend):
    # silu of 1, -1 and 2 is .73106, -.26894 and 1.76159, in bfloat16 .73046875, -.26953125 and 1.7578125; times what
    # was not rounded gives 6.59375, -1.8828125 and 15.875.
    out = run(torch.tensor([1.0, -1.0, 2.0, 9.0, 7.0, 9.0]).bfloat16(), backend=backend)
    assert out.tolist() == [6.5625, -1.890625, 15.8125]


@each_dtype
def test_agrees_with_the_module_of_transformers(backend, dtype):
    for size in SIZES:
        gate_up = random_case((2, 9), size, dtype, seed=size)
        assert_as_module(run(gate_up, backend=backend), gate_up)


@kernels
@each_dtype
def test_is_as_close_to_exact_as_the_module_is(backend, dtype):
    gate_up = random_case((40,), 1000, dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    exact = gate / (1 + (-gate).exp()) * up
    off, plain = ((x.double() - exact).abs() / exact.abs() for x in (run(gate_up, backend=backend), module(gate_up)))
    assert off.max() <= plain.max() + torch.finfo(torch.float32).eps


def test_every_gate_of_float32_is_served_to_some_units_in_the_last_place(backend):
    sizes = torch.logspace(-40, 38, 2001)
    gate = torch.cat((torch.linspace(-104, 104, 20001), sizes, -sizes))
    out = run(torch.cat((gate, torch.ones_like(gate))), backend=backend)
    wide = gate.double()
    exact = wide / (1 + (-wide).exp())
    bound = UNITS * torch.finfo(torch.float32).eps * exact.abs() + LEAST
    assert ((out.double() - exact).abs() <= bound).all()
    assert (out[gate > 1e-37] > 0).all() and (out[gate < 0] <= 0).all()


@each_dtype
def test_limits_are_sensible(backend, dtype):
    infinity, nan, largest = float("inf"), float("nan"), torch.finfo(dtype).max
    gate = torch.tensor([infinity, -infinity, nan, largest, -largest, 0.0, -0.0, 2.0, 2.0], dtype=dtype)
    up = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 5.0, 5.0, nan, -infinity], dtype=dtype)
    out = run(torch.cat((gate, up)), backend=backend)
    assert out[[0, 3]].tolist() == [infinity, largest] and not out[[1, 4, 5, 6]].any()
    assert out[[2, 7]].isnan().all() and out[8] == -infinity


@each_dtype
def test_an_element_does_not_notice_its_place_and_company(backend, dtype):
    gate_up = random_case((), 70, dtype)
    gate, up = gate_up.chunk(2)
    alone = torch.cat([run(torch.stack(pair), backend=backend) for pair in zip(gate, up, strict=True)])
    for first, last in ((0, 70), (1, 70), (0, 64), (3, 36), (7, 24), (69, 70), (50, 67)):
        assert torch.equal(run(torch.cat((gate[first:last], up[first:last])), backend=backend), alone[first:last])
    rows = torch.cat((gate.view(7, 10), up.view(7, 10)), dim=1)
    assert torch.equal(run(rows, backend=backend).flatten(), alone)
    poisoned = rows.clone()
    poisoned[::2] = torch.tensor([float("nan"), float("inf"), -1e38, 0.0]).repeat(5)
    assert torch.equal(run(poisoned, backend=backend)[1::2], alone.view(7, 10)[1::2])


@each_dtype
def test_an_element_of_a_long_row_does_not_notice_its_place_and_company(backend, dtype):
    gate, up = random_case((), 1500, dtype).chunk(2)
    whole = run(torch.cat((gate, up)), backend=backend)
    for first, last in ((0, 1), (1, 1500), (1023, 1025), (700, 1300)):
        assert torch.equal(run(torch.cat((gate[first:last], up[first:last])), backend=backend), whole[first:last])
    gate[7], gate[9], up[11] = float("nan"), float("inf"), float("nan")
    out = run(torch.cat((gate, up)), backend=backend)
    kept = [i for i in range(1500) if i not in (7, 9, 11)]
    assert torch.equal(out[kept], whole[kept]) and out[[7, 11]].isnan().all()


@kernels
@each_dtype
def test_elements_do_not_notice_the_threads(backend, dtype, threads):
    gate_up = random_case((60 if backend == "cpu" else 1,), 5003, dtype)  # more than one piece of a row, and threads
    threads(1)
    alone = torch.stack([run(row, backend=backend) for row in gate_up])
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(run(gate_up, backend=backend), alone)
    assert_as_module(alone, gate_up)


@each_dtype
def test_any_strides_are_read_as_they_lie(backend, dtype):
    gate_up = random_case((3, 2, 2), 37, dtype)
    expected = run(gate_up, backend=backend)
    views = {
        "a slice": torch.empty(4, 3, 4, 80, dtype=dtype)[:3, :2, 1:3, 3:77],
        "leading dimensions swapped": torch.empty(2, 3, 2, 74, dtype=dtype).permute(1, 2, 0, 3),
        "I outermost": torch.empty(74, 3, 2, 2, dtype=dtype).permute(1, 2, 3, 0),
        "every other element": torch.empty(3, 2, 2, 148, dtype=dtype)[..., 1::2],
    }
    for lies, view in views.items():
        out = run(view.copy_(gate_up), backend=backend)
        assert torch.equal(out, expected) and out.is_contiguous(), lies
    repeated = gate_up[:1].expand(3, 2, 2, 74)
    assert torch.equal(run(repeated, backend=backend), expected[:1].expand(3, 2, 2, 37))


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 1, 5)], ids=str)
def test_one_to_four_dimensions(backend, shape):
    gate_up = random_case(shape, 24)
    assert_as_module(run(gate_up, backend=backend), gate_up)


@pytest.mark.parametrize("shape, size", [((0,), 5), ((3,), 0), ((2, 0), 5), ((), 0), ((0, 4, 0), 0)])
def test_empty_sizes_are_fine(backend, shape, size):
    assert run(random_case(shape, size), backend=backend).shape == (*shape, size)


REFUSED = [
    ("gate_up", None, TypeError, "gate_up must be a tensor, got NoneType"),
    ("gate_up", torch.tensor(1.0), ValueError, r"gate_up must be \[..., 2 \* I\] of 1 to 4 dimensions, got \[\]"),
    ("gate_up", torch.zeros(1, 1, 1, 3, 8), ValueError, r"gate_up must be .*got \[1, 1, 1, 3, 8\]"),
    ("gate_up", torch.zeros(3, 7), ValueError, r"gate_up must be .*, with an even last dimension, got \[3, 7\]"),
    ("gate_up", torch.zeros(3, 8).int(), TypeError, "gate_up must be torch.float32 or .*got torch.int32"),
]


@kernels
@each_dtype
@pytest.mark.parametrize("size", [64, 1024, 1040])
def test_alignment_does_not_change_a_bit(backend, dtype, size):
    gate_up = random_case((3,), size, dtype)
    off = torch.nn.functional.pad(gate_up, (1, 0))[:, 1:]
    assert torch.equal(run(gate_up, backend=backend), run(off, backend=backend))


@backends("emulation")
@each_dtype
def test_one_launch_reads_everything_once(counted, dtype):
    gate_up = random_case((5,), 1552, dtype)
    counters = counted(lambda: run(gate_up, backend="cuda"))
    assert counters["launches"] == 1 and counters["loaded_bytes"] == gate_up.numel() * dtype.itemsize
