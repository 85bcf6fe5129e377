"""thin_linear is a linear layer, and no row of it notices the others."""

import os
import subprocess
import sys

import pytest
import torch

import simsd_kernels
from backends import needs_compiled_ops, on_each_backend, unsafe
from simsd_kernels.thin_linear import reference

each_backend = on_each_backend("thin_linear")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# (N, K) around the vectors' and tiles' widths.
SIZES = [(1, 1), (5, 3), (4, 16), (6, 17), (33, 100), (7, 333), (130, 257), (64, 128)]


def random_case(shape=(7,), n=33, k=100, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, k, generator=generator).to(dtype)
    return x, torch.randn(n, k, generator=generator).to(dtype)


@pytest.fixture
def threads():
    """Sets the number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@each_backend
@each_dtype
@pytest.mark.parametrize("n, k", SIZES)
def test_it_is_the_linear_layer(backend, dtype, n, k):
    x, weight = random_case((13,), n, k, dtype)
    got = simsd_kernels.thin_linear(x, weight, backend=backend)
    exact = x.double() @ weight.double().T
    # No sum of K float32 terms errs by more; then the result is rounded once.
    magnitude = x.double().abs() @ weight.double().abs().T
    bound = k * torch.finfo(torch.float32).eps * magnitude + torch.finfo(dtype).eps * exact.abs()
    assert got.dtype == dtype and got.shape == (13, n)
    assert ((got.double() - exact).abs() <= bound).all()


@each_backend
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 1, 5)], ids=str)
def test_leading_sizes_are_kept(backend, shape):
    x, weight = random_case(shape)
    got = simsd_kernels.thin_linear(x, weight, backend=backend)
    torch.testing.assert_close(got, torch.nn.functional.linear(x, weight))


@each_backend
@each_dtype
@pytest.mark.parametrize("n, k", SIZES)
def test_rows_do_not_notice_how_many_they_are(backend, dtype, n, k, threads):
    rows = 512 if backend == "cpu" else 64
    x, weight = random_case((rows,), n, k, dtype)
    threads(1)
    alone = torch.cat([simsd_kernels.thin_linear(row, weight, backend=backend) for row in x.split(1)])
    for count in (1, 2):
        threads(count)
        for m in [*range(1, 71), 128, 512]:
            if m > rows:
                continue
            got = simsd_kernels.thin_linear(x[rows - m :], weight, backend=backend)
            assert torch.equal(got, alone[rows - m :]), f"{m} rows, {count} threads"


@each_backend
def test_rows_do_not_notice_the_threads(backend, threads):
    x, weight = random_case((128,), 640, 256)  # enough work for every thread
    threads(1)
    alone = simsd_kernels.thin_linear(x, weight, backend=backend)
    for count in (2, 3):
        threads(count)
        assert torch.equal(simsd_kernels.thin_linear(x, weight, backend=backend), alone)


@each_backend
def test_rows_do_not_notice_their_place_and_company(backend):
    x, weight = random_case((40,))
    expected = simsd_kernels.thin_linear(x, weight, backend=backend)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(simsd_kernels.thin_linear(x[order], weight, backend=backend), expected[order])
    in_a_batch = simsd_kernels.thin_linear(x.reshape(5, 8, -1), weight, backend=backend)
    assert torch.equal(in_a_batch.reshape(40, -1), expected)
    poisoned = x.clone()
    poisoned[::3] = torch.tensor([float("nan"), float("inf"), -1e38, 0.0]).repeat(25)
    got = simsd_kernels.thin_linear(poisoned, weight, backend=backend)
    assert torch.equal(got[1::3], expected[1::3]) and torch.equal(got[2::3], expected[2::3])
    assert got[::3].isnan().all()


@each_backend
def test_outputs_do_not_notice_the_other_weight_rows(backend):
    x, weight = random_case((9,), 70)
    expected = simsd_kernels.thin_linear(x, weight, backend=backend)
    for first, last in ((0, 1), (3, 10), (69, 70)):
        part = simsd_kernels.thin_linear(x, weight[first:last], backend=backend)
        assert torch.equal(part, expected[:, first:last])


@each_backend
@each_dtype
def test_strides_change_nothing(backend, dtype):
    x, weight = random_case((4, 6), dtype=dtype)
    expected = simsd_kernels.thin_linear(x, weight, backend=backend)
    wide = torch.stack((x, x), dim=-1)[..., 0]
    turned = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for view in (wide, turned, x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert not view.is_contiguous()
        assert torch.equal(simsd_kernels.thin_linear(view, weight, backend=backend), expected)
    column_major = weight.T.contiguous().T
    padded = torch.nn.functional.pad(weight, (3, 2))[:, 3:-2]
    for view in (column_major, padded):
        assert torch.equal(simsd_kernels.thin_linear(x, view, backend=backend), expected)
    repeated = x[:1].expand(4, 6, 100)
    got = simsd_kernels.thin_linear(repeated, weight, backend=backend)
    assert torch.equal(got, expected[:1].expand(4, 6, 33))


@each_backend
@pytest.mark.parametrize("shape, n, k", [((0,), 5, 4), ((3,), 0, 4), ((2, 0), 5, 4), ((0,), 0, 0)])
def test_empty_sizes_are_fine(backend, shape, n, k):
    got = simsd_kernels.thin_linear(*random_case(shape, n, k), backend=backend)
    assert got.shape == (*shape, n)


@each_backend
def test_a_sum_over_nothing_is_zero(backend):
    assert torch.equal(simsd_kernels.thin_linear(*random_case((3,), 5, 0), backend=backend), torch.zeros(3, 5))


def test_reference_takes_float64():
    x, weight = random_case(dtype=torch.float64)
    torch.testing.assert_close(simsd_kernels.thin_linear(x, weight), x @ weight.T)
    with pytest.raises(RuntimeError, match="cpu: .*float64"):
        simsd_kernels.thin_linear(x, weight, backend="cpu")


def test_reference_in_parts_is_the_same(monkeypatch):
    x, weight = random_case()
    whole = simsd_kernels.thin_linear(x, weight, backend="reference")
    monkeypatch.setattr(reference, "MAX_PRODUCTS", 1000)
    assert torch.equal(simsd_kernels.thin_linear(x, weight, backend="reference"), whole)


@needs_compiled_ops
@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512"])
def test_every_instruction_set_keeps_the_promise(capability):
    if capability not in _capabilities():
        pytest.skip(f"this machine has no {capability}")
    script = (
        "import torch, simsd_kernels\n"
        f"assert torch.ops.simsd._cpu_capability() == {capability!r}\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    for n, k in ((5, 3), (33, 100), (130, 257)):\n"
        "        x, w = torch.randn(70, k).to(dtype), torch.randn(n, k).to(dtype)\n"
        "        alone = torch.cat([simsd_kernels.thin_linear(row, w) for row in x.split(1)])\n"
        "        torch.testing.assert_close(alone.double(), x.double() @ w.double().T, atol=0.1, rtol=0.02)\n"
        "        for m in range(1, 71):\n"
        "            assert torch.equal(simsd_kernels.thin_linear(x[:m], w), alone[:m]), (dtype, n, k, m)\n"
    )
    subprocess.run([sys.executable, "-c", script], env=os.environ | {"SIMSD_CPU_CAPABILITY": capability}, check=True)


def _capabilities() -> list[str]:
    order = ["portable", "avx2", "avx512"]
    return order[: order.index(torch.ops.simsd._cpu_capability()) + 1]


REFUSED = [
    ("x", None, TypeError, "x must be a tensor, got NoneType"),
    ("x", torch.tensor(1.0), ValueError, r"x must be \[..., K\]"),
    ("x", torch.zeros(7, 100, dtype=torch.int32), TypeError, "x must be torch.float32.*got torch.int32"),
    ("x", torch.zeros(7, 99), ValueError, r"weight must be \[N, K\] = \[any, 99\], got \[33, 100\]"),
    ("weight", torch.zeros(100), ValueError, r"weight must be \[N, K\] = \[any, 100\], got \[100\]"),
    ("weight", torch.zeros(33, 100).bfloat16(), TypeError, "weight must be torch.float32, got torch.bfloat16"),
    ("weight", torch.zeros(33, 100, device="meta"), ValueError, "one device.*weight on meta"),
]


@pytest.mark.parametrize("name, value, error, message", REFUSED)
def test_bad_input_is_refused_by_name(name, value, error, message):
    good = dict(zip(("x", "weight"), random_case(), strict=True))
    with pytest.raises(error, match=message):
        simsd_kernels.thin_linear(**{**good, name: value})


@needs_compiled_ops
def test_compiled_op_checks_shapes_and_dtypes_itself():
    good = dict(zip(("x", "weight"), random_case(), strict=True))
    for name, value in unsafe(REFUSED, good):
        with pytest.raises(RuntimeError, match="thin_linear: "):
            torch.ops.simsd.thin_linear(**{**good, name: value})


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "with gradients"])
def test_opcheck(gradients):
    given = [value.requires_grad_(gradients) for value in random_case((2, 5))]
    torch.library.opcheck(torch.ops.simsd.thin_linear, given)


@each_backend
def test_gradients_are_those_of_the_linear_layer(backend):
    ours = [value.requires_grad_() for value in random_case((2, 5))]
    torchs = [value.detach().clone().requires_grad_() for value in ours]
    simsd_kernels.thin_linear(*ours, backend=backend).square().sum().backward()
    torch.nn.functional.linear(*torchs).square().sum().backward()
    for mine, theirs in zip(ours, torchs, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-3, rtol=1e-3)


@each_backend
def test_compiles_into_a_larger_graph(backend):
    def step(x, weight):
        return simsd_kernels.thin_linear(x, weight, backend=backend) + 1

    given = random_case((2, 5))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*given), step(*given))
