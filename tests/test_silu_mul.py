"""silu(gate) * up: what transformers' MLP computes, rounded as it rounds, and no element notices another."""

from __future__ import annotations

import pytest
import torch

import simsd_kernels
from backends import needs_compiled_ops, on_each_backend, unsafe
from simsd_kernels import dispatch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
each_backend = on_each_backend("silu_mul")
each_kernel = on_each_backend("silu_mul", but="reference")
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
# I around the vectors' widths, and of real models.
SIZES = (1, 3, 8, 16, 33, 448, 1000, 3072)


def random_case(shape=(3, 5), size=100, dtype=torch.float32, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, 2 * size, generator=generator) * 4).to(dtype)


def run(gate_up: torch.Tensor, backend: str | None = None) -> torch.Tensor:
    return simsd_kernels.silu_mul(gate_up, backend=backend)


def module(gate_up: torch.Tensor) -> torch.Tensor:
    """As Qwen3MLP has it, between its products."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def assert_as_module(out: torch.Tensor, gate_up: torch.Tensor) -> None:
    """But for a unit in the last place of silu(gate) now and then."""
    wanted = module(gate_up)
    assert out.shape == wanted.shape and out.dtype == wanted.dtype and out.is_contiguous()
    assert torch.equal(out.isnan(), wanted.isnan())
    difference = (out.double() - wanted.double()).abs().nan_to_num()  # infinite ones are the same
    kind = torch.finfo(out.dtype)
    # Near 0 units are those of the least number, or silu(gate) may be 0; the product with up takes so many.
    least = (kind.smallest_normal * kind.eps + 1e-35) * (1 + gate_up.chunk(2, dim=-1)[1].double().abs())
    unit = kind.eps * wanted.double().abs().clamp(max=kind.max) + least
    assert (difference <= (4 if out.dtype == torch.float32 else 2) * unit).all(), float((difference / unit).max())
    if out.dtype != torch.float32:
        assert int((difference > least).sum()) <= 2 + 1e-3 * difference.numel()


@each_backend
def test_golden_values(backend):
    gate = torch.tensor([0.0, 1.0, -1.0, 20.0, -20.0])
    out = run(torch.cat((gate, torch.tensor([7.0, 2.0, 2.0, 1.0, 1.0]))), backend)
    expected = [0.0, 2 * 0.7310585786, -2 * 0.2689414214, 19.9999999588, -4.122307e-08]
    torch.testing.assert_close(out, torch.tensor(expected), rtol=3e-7, atol=0)


@each_backend
def test_silu_is_rounded_before_it_is_multiplied(backend):
    # silu of 1, -1 and 2 is .73106, -.26894 and 1.76159, in bfloat16 .73046875, -.26953125 and 1.7578125; times what
    # was not rounded gives 6.59375, -1.8828125 and 15.875.
    out = run(torch.tensor([1.0, -1.0, 2.0, 9.0, 7.0, 9.0]).bfloat16(), backend)
    assert out.tolist() == [6.5625, -1.890625, 15.8125]


@each_backend
@each_dtype
def test_agrees_with_the_module_of_transformers(backend, dtype):
    for size in SIZES:
        gate_up = random_case((2, 9), size, dtype, seed=size)
        assert_as_module(run(gate_up, backend), gate_up)


@each_kernel
@each_dtype
def test_is_as_close_to_exact_as_the_module_is(backend, dtype):
    gate_up = random_case((40,), 1000, dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    exact = gate / (1 + (-gate).exp()) * up
    off, plain = ((x.double() - exact).abs() / exact.abs() for x in (run(gate_up, backend), module(gate_up)))
    assert off.max() <= plain.max() + torch.finfo(torch.float32).eps


@each_backend
def test_every_gate_of_float32_is_served_to_some_units_in_the_last_place(backend):
    sizes = torch.logspace(-40, 38, 2001)
    gate = torch.cat((torch.linspace(-104, 104, 20001), sizes, -sizes))
    out = run(torch.cat((gate, torch.ones_like(gate))), backend)
    wide = gate.double()
    exact = wide / (1 + (-wide).exp())
    bound = 4 * torch.finfo(torch.float32).eps * exact.abs() + 1e-35
    assert ((out.double() - exact).abs() <= bound).all()
    assert (out[gate > 1e-37] > 0).all() and (out[gate < 0] <= 0).all()


@each_backend
@each_dtype
def test_limits_are_sensible(backend, dtype):
    infinity, nan, largest = float("inf"), float("nan"), torch.finfo(dtype).max
    gate = torch.tensor([infinity, -infinity, nan, largest, -largest, 0.0, -0.0, 2.0, 2.0], dtype=dtype)
    up = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 5.0, 5.0, nan, -infinity], dtype=dtype)
    out = run(torch.cat((gate, up)), backend)
    assert out[[0, 3]].tolist() == [infinity, largest] and not out[[1, 4, 5, 6]].any()
    assert out[[2, 7]].isnan().all() and out[8] == -infinity


@each_backend
@each_dtype
def test_an_element_does_not_notice_its_place_and_company(backend, dtype):
    gate_up = random_case((), 70, dtype)
    gate, up = gate_up.chunk(2)
    alone = torch.cat([run(torch.stack(pair), backend) for pair in zip(gate, up, strict=True)])
    for first, last in ((0, 70), (1, 70), (0, 64), (3, 36), (7, 24), (69, 70), (50, 67)):
        assert torch.equal(run(torch.cat((gate[first:last], up[first:last])), backend), alone[first:last])
    rows = torch.cat((gate.view(7, 10), up.view(7, 10)), dim=1)
    assert torch.equal(run(rows, backend).flatten(), alone)
    poisoned = rows.clone()
    poisoned[::2] = torch.tensor([float("nan"), float("inf"), -1e38, 0.0]).repeat(5)
    assert torch.equal(run(poisoned, backend)[1::2], alone.view(7, 10)[1::2])


@each_kernel
@each_dtype
def test_elements_do_not_notice_the_threads(backend, dtype):
    before = torch.get_num_threads()
    rows = 60 if backend == "cpu" else 1
    gate_up = random_case((rows,), 5003, dtype)  # more than one piece of a row, and threads for them
    try:
        torch.set_num_threads(1)
        alone = torch.stack([run(row, backend) for row in gate_up])
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(run(gate_up, backend), alone)
    finally:
        torch.set_num_threads(before)
    assert_as_module(alone, gate_up)


@each_backend
@each_dtype
def test_any_strides_are_read_as_they_lie(backend, dtype):
    gate_up = random_case((4, 3, 6), 37, dtype)
    expected = run(gate_up, backend)
    views = {
        "a slice": torch.empty(5, 4, 8, 80, dtype=dtype)[:4, :3, 1:7, 3:77],
        "leading dimensions swapped": torch.empty(6, 4, 3, 74, dtype=dtype).permute(1, 2, 0, 3),
        "I outermost": torch.empty(74, 4, 3, 6, dtype=dtype).permute(1, 2, 3, 0),
        "every other element": torch.empty(4, 3, 6, 148, dtype=dtype)[..., 1::2],
    }
    for lies, view in views.items():
        out = run(view.copy_(gate_up), backend)
        assert torch.equal(out, expected) and out.is_contiguous(), lies
    repeated = gate_up[:1].expand(4, 3, 6, 74)
    assert torch.equal(run(repeated, backend), expected[:1].expand(4, 3, 6, 37))


@each_backend
@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 1, 5)], ids=str)
def test_one_to_four_dimensions(backend, shape):
    gate_up = random_case(shape, 24)
    assert_as_module(run(gate_up, backend), gate_up)


@each_backend
@pytest.mark.parametrize("shape, size", [((0,), 5), ((3,), 0), ((2, 0), 5), ((), 0), ((0, 4, 0), 0)])
def test_empty_sizes_are_fine(backend, shape, size):
    assert run(random_case(shape, size), backend).shape == (*shape, size)


def test_float64_is_left_to_the_reference():
    gate_up = random_case().double()
    torch.testing.assert_close(run(gate_up), module(gate_up))
    with pytest.raises(RuntimeError, match="cpu: supports float32, bfloat16 and float16, got torch.float64"):
        run(gate_up, "cpu")


REFUSED = [
    ("gate_up", None, TypeError, "gate_up must be a tensor, got NoneType"),
    ("gate_up", torch.tensor(1.0), ValueError, r"gate_up must be \[..., 2 \* I\] of 1 to 4 dimensions, got \[\]"),
    ("gate_up", torch.zeros(1, 1, 1, 3, 8), ValueError, r"gate_up must be .*got \[1, 1, 1, 3, 8\]"),
    ("gate_up", torch.zeros(3, 7), ValueError, r"gate_up must be .*, with an even last dimension, got \[3, 7\]"),
    ("gate_up", torch.zeros(3, 8).int(), TypeError, "gate_up must be torch.float32 or .*got torch.int32"),
]


@pytest.mark.parametrize("name, value, error, message", REFUSED)
def test_bad_input_is_refused_by_name(name, value, error, message):
    with pytest.raises(error, match=message):
        simsd_kernels.silu_mul(**{name: value})


@needs_compiled_ops
def test_compiled_op_checks_shapes_and_dtypes_itself():
    namespaces = ("simsd", "simsd_emulated") if dispatch.EMULATION else ("simsd",)
    for _, value in unsafe(REFUSED, {"gate_up": random_case()}):
        for namespace in namespaces:
            with pytest.raises(RuntimeError, match="silu_mul: "):
                getattr(torch.ops, namespace).silu_mul(value)


@each_dtype
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.simsd.silu_mul, (random_case(dtype=dtype),))


@each_backend
def test_compiles_into_a_larger_graph(backend):
    def mlp(gate_up):
        return simsd_kernels.silu_mul(gate_up * 2, backend=backend) + 1

    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(random_case()), mlp(random_case()))
