"""grouped_linear is a linear layer per group of rows, and no row of it notices the others."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import simsd_kernels
from backends import needs_compiled_ops, on_each_backend, unsafe
from simsd_kernels import dispatch
from simsd_kernels.grouped_linear import reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
each_backend = on_each_backend("grouped_linear")
each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
# Rows of each expert: some without any, at either end and between; all with one expert; around the kernels' tiles.
GROUPS = [(3, 0, 5, 1), (0, 0, 7), (13, 0, 0), (1, 1, 1, 1, 1), (6, 7, 8, 9), (0, 17, 0, 0, 2, 0), (70, 1)]
# (N, K) around the vectors' and tiles' widths.
SIZES = [(1, 1), (5, 3), (6, 17), (33, 100), (130, 257), (64, 128)]


def random_case(groups=(3, 0, 5, 1), n=33, k=100, dtype=torch.float32, seed=0):
    """x, weight, offsets."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(groups), k, generator=generator).to(dtype)
    weight = torch.randn(len(groups), n, k, generator=generator).to(dtype)
    return x, weight, offsets_of(groups)


def offsets_of(groups) -> torch.Tensor:
    return torch.tensor([0, *groups]).cumsum(0).int()


def run(x, weight, offsets, backend=None) -> torch.Tensor:
    return simsd_kernels.grouped_linear(x, weight, offsets, backend=backend)


def alone(x, weight, offsets, backend=None) -> torch.Tensor:
    """Every row by itself, by thin_linear."""
    rows = []
    for expert, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        rows += [simsd_kernels.thin_linear(row, weight[expert], backend=backend) for row in x[begin:end].split(1)]
    return torch.cat(rows)


def assert_right(out, x, weight, offsets) -> None:
    """Within what rounding explains: no sum of K float32 terms errs by more, and the result is rounded once."""
    exact = torch.empty(len(x), weight.shape[1], dtype=torch.float64)
    magnitude = exact.clone()
    for expert in range(len(weight)):
        rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
        exact[rows] = x[rows].double() @ weight[expert].double().T
        magnitude[rows] = x[rows].double().abs() @ weight[expert].double().abs().T
    bound = x.shape[1] * torch.finfo(torch.float32).eps * magnitude + torch.finfo(x.dtype).eps * exact.abs()
    assert out.dtype == x.dtype and out.shape == exact.shape and out.is_contiguous()
    assert ((out.double() - exact).abs() <= bound).all()


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@each_backend
def test_golden_values(backend):
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]])
    weight = torch.tensor([[[1.0, 1.0]], [[7.0, 7.0]], [[2.0, -3.0]]])
    out = run(x, weight, torch.tensor([0, 1, 1, 3], dtype=torch.int32), backend)
    assert out.tolist() == [[3.0], [9.0], [-11.0]]


@each_backend
@each_dtype
@pytest.mark.parametrize("n, k", SIZES)
def test_each_group_is_a_linear_layer_of_its_own(backend, dtype, n, k):
    for seed, groups in enumerate(GROUPS):
        given = random_case(groups, n, k, dtype, seed)
        assert_right(run(*given, backend), *given)


@each_backend
@each_dtype
@pytest.mark.parametrize("n, k", [(33, 100), (64, 128)])
def test_a_rows_bits_are_those_of_thin_linear_whatever_its_group(backend, dtype, n, k, threads):
    for seed, groups in enumerate(GROUPS):
        given = random_case(groups, n, k, dtype, seed)
        threads(1)
        expected = alone(*given, backend)
        for count in (1, 2, 3):
            threads(count)
            assert torch.equal(run(*given, backend), expected), f"groups {groups}, {count} threads"


@each_backend
def test_threads_share_large_groups_without_changing_a_bit(backend, threads):
    given = random_case((90, 0, 6, 32), 640, 256) if backend == "cpu" else random_case((20, 0, 6), 40, 64)
    threads(1)
    expected = alone(*given, backend)
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(run(*given, backend), expected)


@each_backend
@each_dtype
def test_rows_do_not_notice_their_place_and_company(backend, dtype):
    x, weight, offsets = random_case((4, 0, 9, 3), dtype=dtype)
    expected = run(x, weight, offsets, backend)
    order = torch.tensor([3, 1, 0, 2, *(4 + torch.randperm(9)).tolist(), 14, 15, 13])
    assert torch.equal(run(x[order], weight, offsets, backend), expected[order])
    # The same rows among other experts, at other places.
    moved = torch.cat((weight.flip(0), weight))
    rows = torch.cat((x[13:], x[4:13], x[:4], x[:2]))
    got = run(rows, moved, offsets_of((3, 9, 0, 4, 2, 0, 0, 0)), backend)
    assert torch.equal(got, torch.cat((expected[13:], expected[4:13], expected[:4], expected[:2])))
    poisoned = x.clone()
    poisoned[::3] = torch.tensor([float("nan"), float("inf"), -1e4, 0.0], dtype=dtype).repeat(25)
    got = run(poisoned, weight, offsets, backend)
    assert torch.equal(got[1::3], expected[1::3]) and torch.equal(got[2::3], expected[2::3])
    assert got[::3].isnan().all()


@each_backend
def test_experts_without_rows_add_nothing(backend):
    x, weight, offsets = random_case((0, 4, 0, 0, 9, 0))
    expected = run(x, weight, offsets, backend)
    weight[[0, 2, 3, 5]] = float("nan")
    assert torch.equal(run(x, weight, offsets, backend), expected)


@needs_compiled_ops
def test_on_the_cpu_the_weights_of_experts_without_rows_are_not_read():
    """Their pages cannot be: whoever reads one is killed."""
    script = """
import ctypes, mmap, torch, simsd_kernels
experts, n, k = 6, mmap.PAGESIZE // 64, 16
memory = mmap.mmap(-1, experts * n * k * 4)
weight = torch.frombuffer(memory, dtype=torch.float32).view(experts, n, k)
weight.copy_(torch.randn(weight.shape))
x, offsets = torch.randn(10, k), torch.tensor([0, 0, 3, 3, 3, 10, 10], dtype=torch.int32)
expected = simsd_kernels.grouped_linear(x, weight.clone(), offsets)
libc = ctypes.CDLL(None, use_errno=True)
for expert in (0, 2, 3, 5):
    assert libc.mprotect(ctypes.c_void_p(weight[expert].data_ptr()), n * k * 4, 0) == 0, ctypes.get_errno()
assert torch.equal(simsd_kernels.grouped_linear(x, weight, offsets), expected)
assert torch.equal(torch.ops.simsd.grouped_linear(x, weight, offsets), expected)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@each_backend
@each_dtype
def test_strides_change_nothing(backend, dtype):
    x, weight, offsets = random_case(dtype=dtype)
    expected = run(x, weight, offsets, backend)
    for view in (x.T.contiguous().T, torch.stack((x, x), dim=-1)[..., 0], torch.nn.functional.pad(x, (1, 2))[:, 1:-2]):
        assert not view.is_contiguous() and torch.equal(run(view, weight, offsets, backend), expected)
    views = {
        "column major": weight.transpose(1, 2).contiguous().transpose(1, 2),
        "experts innermost": weight.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "padded rows": torch.nn.functional.pad(weight, (3, 2))[..., 3:-2],
        "every other expert": torch.stack((weight, torch.full_like(weight, float("nan"))), 1).flatten(0, 1)[::2],
    }
    for lies, view in views.items():
        assert torch.equal(run(x, view, offsets, backend), expected), lies
    assert torch.equal(run(x, weight, torch.stack((offsets, offsets + 9), 1)[:, 0], backend), expected)
    shared = run(x, weight[:1].expand(4, 33, 100), offsets, backend)
    assert torch.equal(shared, simsd_kernels.thin_linear(x, weight[0], backend=backend))


@each_backend
@pytest.mark.parametrize("groups, n, k", [((0, 0), 5, 4), ((), 5, 4), ((2, 1), 0, 4), ((0,), 0, 0)])
def test_empty_sizes_are_fine(backend, groups, n, k):
    assert run(*random_case(groups, n, k), backend).shape == (sum(groups), n)


@each_backend
@each_dtype
def test_a_sum_over_nothing_is_zero(backend, dtype):
    assert torch.equal(run(*random_case((2, 0, 1), 5, 0, dtype), backend), torch.zeros(3, 5, dtype=dtype))


def test_float64_is_left_to_the_reference():
    given = random_case(dtype=torch.float64)
    out = run(*given)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out[3:8], given[0][3:8] @ given[1][2].T)
    with pytest.raises(RuntimeError, match="cpu: supports float32, bfloat16 and float16, got torch.float64"):
        run(*given, "cpu")


def test_reference_in_parts_is_the_same(monkeypatch):
    given = random_case()
    whole = run(*given, "reference")
    monkeypatch.setattr(reference, "MAX_PRODUCTS", 1000)
    assert torch.equal(run(*given, "reference"), whole)


REFUSED = [
    ("x", None, TypeError, "x must be a tensor, got NoneType"),
    ("x", torch.zeros(9), ValueError, r"x must be \[M, K\] = \[any, any\], got \[9\]"),
    ("x", torch.zeros(9, 99), ValueError, r"weight must be \[E, N, K\] = \[any, any, 99\], got \[4, 33, 100\]"),
    ("x", torch.zeros(9, 100, dtype=torch.int32), TypeError, "x must be torch.float32.*got torch.int32"),
    ("weight", torch.zeros(33, 100), ValueError, r"weight must be \[E, N, K\] = .*got \[33, 100\]"),
    ("weight", torch.zeros(4, 33, 100).half(), TypeError, "weight must be torch.float32, got torch.float16"),
    ("weight", torch.zeros(5, 33, 100), ValueError, r"offsets must be \[E \+ 1\] = \[6\], got \[5\]"),
    ("weight", torch.zeros(4, 33, 100, device="meta"), ValueError, "one device.*weight on meta"),
    ("offsets", [0, 3, 3, 8, 9], TypeError, "offsets must be a tensor, got list"),
    ("offsets", torch.tensor([0, 3, 3, 8, 9]), TypeError, "offsets must be torch.int32, got torch.int64"),
    ("offsets", torch.zeros(5, 1, dtype=torch.int32), ValueError, r"offsets must be \[E \+ 1\]"),
]
OFFSETS_REFUSED = [
    ([1, 3, 3, 8, 9], "offsets must run from 0 to M = 9, got 1 to 9"),
    ([0, 3, 3, 8, 8], "offsets must run from 0 to M = 9, got 0 to 8"),
    ([0, 3, 3, 8, 2**31 - 1], "offsets must run from 0 to M = 9, got 0 to 2147483647"),
    ([0, 3, 2, 8, 9], "offsets must not decrease, got 2 after 3 for expert 1"),
    ([0, 3, -5, 8, 9], "offsets must not decrease, got -5 after 3 for expert 1"),
    ([0, 3, 3, 10, 9], "offsets must not decrease, got 9 after 10 for expert 3"),
]


@pytest.mark.parametrize("name, value, error, message", REFUSED)
def test_bad_input_is_refused_by_name(name, value, error, message):
    good = dict(zip(("x", "weight", "offsets"), random_case(), strict=True))
    with pytest.raises(error, match=message):
        simsd_kernels.grouped_linear(**{**good, name: value})


@pytest.mark.parametrize("offsets, message", OFFSETS_REFUSED)
def test_offsets_that_are_none_are_refused(offsets, message):
    x, weight, _ = random_case()
    for backend in (None, "reference"):
        with pytest.raises(ValueError, match=message):
            run(x, weight, torch.tensor(offsets, dtype=torch.int32), backend)


@needs_compiled_ops
def test_compiled_op_checks_its_arguments_itself():
    good = dict(zip(("x", "weight", "offsets"), random_case(), strict=True))
    libraries = (torch.ops.simsd, torch.ops.simsd_emulated) if dispatch.EMULATION else (torch.ops.simsd,)
    for name, value in unsafe(REFUSED, good):
        for library in libraries:
            with pytest.raises(RuntimeError, match="grouped_linear: "):
                library.grouped_linear(**{**good, name: value})
    for offsets, message in OFFSETS_REFUSED:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.simsd.grouped_linear(**{**good, "offsets": torch.tensor(offsets, dtype=torch.int32)})


@each_dtype
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.simsd.grouped_linear, random_case(dtype=dtype))


@each_backend
def test_compiles_into_a_larger_graph(backend):
    def step(x, weight, offsets):
        return run(x * 2, weight, offsets, backend) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*random_case()), step(*random_case()))


@each_backend
def test_one_compilation_serves_any_partition(backend):
    """Offsets are values, not shapes: nothing is traced anew for them."""
    traces = []

    def count(graph, inputs):
        traces.append(graph)
        return graph.forward

    step = torch.compile(lambda *given: run(*given, backend), fullgraph=True, backend=count)
    for groups in ((3, 0, 5, 1), (0, 0, 0, 9), (9, 0, 0, 0)):
        given = random_case(groups)
        assert torch.equal(step(*given), run(*given, backend))
    assert len(traces) == 1
