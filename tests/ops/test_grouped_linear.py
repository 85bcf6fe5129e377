"""grouped_linear is a linear layer per group of rows, and no row of it notices the others."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import simsd_kernels
from arguments import Pick, relaid
from backends import FLOATS, backends, callable_of, device_of, each_dtype, kernels, needs_compiled_ops, sized
from simsd_kernels import dispatch
from simsd_kernels.grouped_linear import reference

grouped_linear, thin_linear = callable_of("grouped_linear"), callable_of("thin_linear")
LANES = ("x",)
NAMES = ("x", "weight", "offsets")
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


def int8_case(groups=(3, 0, 5, 1), n=33, k=100, dtype=torch.float32, seed=0):
    """x, weight, offsets, scale."""
    x, _, offsets = random_case(groups, 0, k, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-128, 128, (len(groups), n, k), dtype=torch.int8, generator=generator)
    return x, weight, offsets, 0.001 + 0.02 * torch.rand(len(groups), n, generator=generator)


each_weight = pytest.mark.parametrize("case_of", [random_case, int8_case], ids=["", "int8"])


def good_arguments() -> dict:
    return dict(zip(NAMES, random_case(), strict=True))


def random_arguments(seed: int) -> dict:
    """Rows that fall to experts evenly or to a few; tensors plain, or as views that must be read element by element."""
    pick = Pick(seed)
    dtype, n = pick(*FLOATS), pick(1, 5, 15, 16, 17, 31, 32, 33, 70)
    k = pick(1, 7, 8, 16, 24, 63, 64, 65, 100, 128, 200, 256, 257, 520, 577, 600, 640)
    experts = pick(1, 2, 5, 8, 31, 32, 33, 70)  # around the lanes that share them
    share = torch.rand(experts, generator=pick.generator) ** pick(1, 4, 20)
    share[torch.rand(experts, generator=pick.generator) < pick(0.0, 0.5, 0.9)] = 0
    share[int(torch.randint(experts, (), generator=pick.generator))] += 0.01
    taken = torch.multinomial(share, pick(1, 3, 8, 20, 64, 90), replacement=True, generator=pick.generator)
    groups = torch.bincount(taken, minlength=experts).tolist()
    x, weight, offsets, *scale = pick(random_case, random_case, int8_case)(groups, n, k, dtype, seed)
    if pick(False, False, False, True):  # experts far apart, by an odd number of elements
        flat = torch.nn.functional.pad(weight.flatten(1), (0, 1), value=-99 if scale else float("nan"))
        weight = flat[:, :-1].unflatten(1, (n, k))
    else:
        weight = relaid(weight, pick)
    made = {"x": relaid(x, pick), "weight": weight, "offsets": relaid(offsets, pick)}
    return made | ({"scale": relaid(scale[0].to(pick(dtype, torch.float32)), pick)} if scale else {})


def lane_alone(made: dict, row: int) -> dict:
    return made | {"x": made["x"][row : row + 1], "offsets": (made["offsets"] > row).int()}


def offsets_of(groups) -> torch.Tensor:
    return torch.tensor([0, *groups]).cumsum(0).int()


def run(x, weight, offsets, scale=None, backend=None) -> torch.Tensor:
    return grouped_linear(x, weight, offsets, scale, backend=backend)


def alone(x, weight, offsets, scale=None, backend=None) -> torch.Tensor:
    """Every row by itself, by thin_linear."""
    rows = []
    for expert, (begin, end) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        own = (weight[expert],) if scale is None else (weight[expert], scale[expert])
        rows += [thin_linear(row, *own, backend=backend) for row in x[begin:end].split(1)]
    return torch.cat(rows)


def assert_right(out, x, weight, offsets, scale=None) -> None:
    """Within what rounding explains: no sum of K float32 terms errs by more; then the result is rounded once, and where
    there is a scale once more."""
    exact = torch.empty(len(x), weight.shape[1], dtype=torch.float64)
    magnitude = exact.clone()
    for expert in range(len(weight)):
        rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
        exact[rows] = x[rows].double() @ weight[expert].double().T
        magnitude[rows] = x[rows].double().abs() @ weight[expert].double().abs().T
        if scale is not None:
            exact[rows] *= scale[expert]
            magnitude[rows] *= scale[expert]
    terms = x.shape[1] + (scale is not None)
    bound = terms * torch.finfo(torch.float32).eps * magnitude + torch.finfo(x.dtype).eps * exact.abs()
    assert out.dtype == x.dtype and out.shape == exact.shape and out.is_contiguous()
    assert ((out.double() - exact).abs() <= bound).all()


def test_golden_values(backend):
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 4.0]])
    weight = torch.tensor([[[1.0, 1.0]], [[7.0, 7.0]], [[2.0, -3.0]]])
    offsets = torch.tensor([0, 1, 1, 3], dtype=torch.int32)
    assert run(x, weight, offsets, backend=backend).tolist() == [[3.0], [9.0], [-11.0]]
    scale = torch.tensor([[0.5], [float("nan")], [2.0]])
    assert run(x, weight.to(torch.int8), offsets, scale, backend).tolist() == [[1.5], [18.0], [-22.0]]


def test_rows_get_their_experts_product_with_thin_linears_bits(backend, seed):
    x, weight, offsets, *scale = random_arguments(seed).values()
    out = run(x, weight, offsets, *scale, backend=backend)
    assert_right(out, x, weight, offsets, *scale)
    if backend in ("cpu", "cuda"):
        plain = torch.clone(weight, memory_format=torch.contiguous_format)
        assert torch.equal(out, alone(x.contiguous(), plain, offsets, *scale, backend=backend))
    else:  # slower
        row = seed % len(x)
        expert = int((offsets <= row).sum()) - 1
        own = weight[expert], *(each[expert] for each in scale)
        assert torch.equal(out[row], thin_linear(x[row], *own, backend=backend))


@each_dtype
@each_weight
@pytest.mark.parametrize("n, k", SIZES)
def test_each_group_is_a_linear_layer_of_its_own(backend, dtype, case_of, n, k):
    for seed, groups in enumerate(sized(GROUPS, interpreted=GROUPS[::2])):
        given = case_of(groups, n, k, dtype, seed)
        assert_right(run(*given, backend=backend), *given)


@each_dtype
@each_weight
@pytest.mark.parametrize("n, k", [(33, 100), (64, 128)])
def test_a_rows_bits_are_those_of_thin_linear_whatever_its_group(backend, dtype, case_of, n, k, threads):
    for seed, groups in enumerate(sized(GROUPS, interpreted=GROUPS[::2])):
        given = case_of(groups, n, k, dtype, seed)
        threads(1)
        expected = alone(*given, backend=backend)
        for count in sized((1, 2, 3), interpreted=(1,)):
            threads(count)
            assert torch.equal(run(*given, backend=backend), expected), f"groups {groups}, {count} threads"


def test_threads_share_large_groups_without_changing_a_bit(backend, threads):
    given = random_case((90, 0, 6, 32), 640, 256) if backend == "cpu" else random_case((20, 0, 6), 40, 64)
    threads(1)
    expected = alone(*given, backend=backend)
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(run(*given, backend=backend), expected)


@each_dtype
def test_rows_do_not_notice_their_place_and_company(backend, dtype):
    x, weight, offsets = random_case((4, 0, 9, 3), dtype=dtype)
    expected = run(x, weight, offsets, backend=backend)
    order = torch.tensor([3, 1, 0, 2, *(4 + torch.randperm(9)).tolist(), 14, 15, 13])
    assert torch.equal(run(x[order], weight, offsets, backend=backend), expected[order])
    # The same rows among other experts, at other places.
    moved = torch.cat((weight.flip(0), weight))
    rows = torch.cat((x[13:], x[4:13], x[:4], x[:2]))
    got = run(rows, moved, offsets_of((3, 9, 0, 4, 2, 0, 0, 0)), backend=backend)
    assert torch.equal(got, torch.cat((expected[13:], expected[4:13], expected[:4], expected[:2])))
    poisoned = x.clone()
    poisoned[::3] = torch.tensor([float("nan"), float("inf"), -1e4, 0.0], dtype=dtype).repeat(25)
    got = run(poisoned, weight, offsets, backend=backend)
    assert torch.equal(got[1::3], expected[1::3]) and torch.equal(got[2::3], expected[2::3])
    assert got[::3].isnan().all()


@each_dtype
def test_nan_and_infinity_stay_in_their_rows(backend, dtype):
    x, weight, offsets = random_case((9, 0, 11), 40, 100, dtype)
    expected = run(x, weight, offsets, backend=backend)
    x[3], x[11, 5], x[19, -1] = float("nan"), float("inf"), float("-inf")
    out = run(x, weight, offsets, backend=backend)
    clean = [row for row in range(20) if row not in (3, 11, 19)]
    assert torch.equal(out[clean], expected[clean]) and not out[[3, 11, 19]].isfinite().any()


@kernels
@each_dtype
def test_no_size_of_a_group_changes_a_bit(backend, dtype):
    x, weight, _ = random_case((80,), 33, 200, dtype)
    weight = weight.expand(3, 33, 200).clone()
    weight[[0, 2]] = float("nan")
    whole = run(x, weight, offsets_of((0, 80, 0)), backend=backend)
    for rows in sized((1, 7, 8, 9, 16, 17, 31, 33, 64, 65), interpreted=(1, 9, 16, 33)):
        out = run(x, torch.cat((weight[1:2], weight)), offsets_of((rows, 0, 80 - rows, 0)), backend=backend)
        assert torch.equal(out, whole), f"{rows} rows"


def test_experts_without_rows_add_nothing(backend):
    x, weight, offsets = random_case((0, 4, 0, 0, 9, 0))
    expected = run(x, weight, offsets, backend=backend)
    weight[[0, 2, 3, 5]] = float("nan")
    assert torch.equal(run(x, weight, offsets, backend=backend), expected)
    x, weight, offsets, scale = int8_case((0, 4, 0, 0, 9, 0))
    expected = run(x, weight, offsets, scale, backend)
    scale[[0, 2, 3, 5]] = float("nan")
    assert torch.equal(run(x, weight, offsets, scale, backend), expected)


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


@each_dtype
@each_weight
def test_strides_change_nothing(backend, dtype, case_of):
    x, weight, offsets, *scale = case_of(dtype=dtype)
    expected = run(x, weight, offsets, *scale, backend=backend)
    for view in (x.T.contiguous().T, torch.stack((x, x), dim=-1)[..., 0], torch.nn.functional.pad(x, (1, 2))[:, 1:-2]):
        assert not view.is_contiguous() and torch.equal(run(view, weight, offsets, *scale, backend=backend), expected)
    views = {
        "column major": weight.transpose(1, 2).contiguous().transpose(1, 2),
        "experts innermost": weight.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "padded rows": torch.nn.functional.pad(weight, (3, 2))[..., 3:-2],
        "every other expert": torch.stack((weight, torch.full_like(weight, -99 if scale else float("nan"))), 1).flatten(
            0, 1
        )[::2],
    }
    for lies, view in views.items():
        assert torch.equal(run(x, view, offsets, *scale, backend=backend), expected), lies
    apart = torch.stack((offsets, offsets + 9), 1)[:, 0]
    assert torch.equal(run(x, weight, apart, *scale, backend=backend), expected)
    for each in scale:
        for view in (each.T.contiguous().T, torch.nn.functional.pad(each, (1, 1), value=float("nan"))[:, 1:-1]):
            assert torch.equal(run(x, weight, offsets, view, backend), expected)
    first = weight[0], *(each[0] for each in scale)
    shared = run(
        x, weight[:1].expand(4, 33, 100), offsets, *(each[:1].expand(4, 33) for each in scale), backend=backend
    )
    assert torch.equal(shared, thin_linear(x, *first, backend=backend))


@each_weight
@pytest.mark.parametrize("groups, n, k", [((0, 0), 5, 4), ((), 5, 4), ((2, 1), 0, 4), ((0,), 0, 0)])
def test_empty_sizes_are_fine(backend, case_of, groups, n, k):
    assert run(*case_of(groups, n, k), backend=backend).shape == (sum(groups), n)


@each_dtype
@each_weight
def test_a_sum_over_nothing_is_zero(backend, dtype, case_of):
    assert torch.equal(run(*case_of((2, 0, 1), 5, 0, dtype), backend=backend), torch.zeros(3, 5, dtype=dtype))


def test_reference_in_parts_is_the_same(monkeypatch):
    given = random_case()
    whole = run(*given, backend="reference")
    monkeypatch.setattr(reference, "MAX_PRODUCTS", 1000)
    assert torch.equal(run(*given, backend="reference"), whole)


REFUSED = [
    ("x", None, TypeError, "x must be a tensor, got NoneType"),
    ("x", torch.zeros(9), ValueError, r"x must be \[M, K\] = \[any, any\], got \[9\]"),
    ("x", torch.zeros(9, 99), ValueError, r"weight must be \[E, N, K\] = \[any, any, 99\], got \[4, 33, 100\]"),
    ("x", torch.zeros(9, 100, dtype=torch.int32), TypeError, "x must be torch.float32.*got torch.int32"),
    ("weight", torch.zeros(33, 100), ValueError, r"weight must be \[E, N, K\] = .*got \[33, 100\]"),
    ("weight", torch.zeros(4, 33, 100).half(), TypeError, "weight must be torch.float32 or torch.int8, got torch.fl"),
    (
        "weight",
        torch.zeros(4, 33, 100, dtype=torch.int8),
        TypeError,
        "scale must be a tensor where weight is torch.int8",
    ),
    ("scale", torch.ones(4, 33), TypeError, "scale must be left out unless weight is torch.int8, got one with torch.f"),
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


@pytest.mark.parametrize("offsets, message", OFFSETS_REFUSED)
def test_offsets_that_are_none_are_refused(backend, offsets, message):
    x, weight, _ = random_case()
    given = x, weight, torch.tensor(offsets, dtype=torch.int32)
    for name in (None, "reference"):
        with pytest.raises(ValueError, match=message):
            run(*given, backend=name)
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=message):
            dispatch.operator("grouped_linear", backend)(*given)


SCALES_REFUSED = [
    (1.0, TypeError, "scale must be a tensor where weight is torch.int8, got float"),
    (torch.ones(33), ValueError, r"scale must be \[E, N\] = \[4, 33\], got \[33\]"),
    (torch.ones(4, 33, 1), ValueError, r"scale must be \[E, N\] = \[4, 33\], got \[4, 33, 1\]"),
    (torch.ones(4, 33).double(), TypeError, "scale must be torch.float32 or torch.float16, got torch.float64"),
    (torch.ones(4, 33, device="meta"), ValueError, "one device.*scale on meta"),
]


@pytest.mark.parametrize("scale, error, message", SCALES_REFUSED)
def test_a_scale_that_fits_no_int8_weight_is_refused(backend, scale, error, message):
    given = int8_case(dtype=torch.float16)[:3]
    with pytest.raises(error, match=message):
        run(*given, scale, backend)
    if backend in ("cpu", "cuda") and torch.is_tensor(scale) and scale.device.type != "meta":
        device = device_of(backend)
        with pytest.raises(RuntimeError, match=message):
            dispatch.operator("grouped_linear", backend)(*(each.to(device) for each in (*given, scale)))


def test_a_scale_that_requires_grad_is_refused(backend):
    *given, scale = int8_case()
    with pytest.raises(RuntimeError, match="has no backward, but scale requires grad"):
        run(*given, scale.requires_grad_(), backend)


@each_dtype
@each_weight
def test_opcheck(dtype, case_of):
    torch.library.opcheck(torch.ops.simsd.grouped_linear, case_of(dtype=dtype))


@pytest.mark.skipif(dispatch.interpreting(), reason="not run: nothing compiles Triton's interpreter")
def test_one_compilation_serves_any_partition(backend):
    """Offsets are values, not shapes: nothing is traced anew for them."""
    traces = []

    def count(graph, inputs):
        traces.append(graph)
        return graph.forward

    function, device = simsd_kernels.grouped_linear, device_of(backend)
    step = torch.compile(lambda *given: function(*given, backend=backend), fullgraph=True, backend=count)
    for groups in ((3, 0, 5, 1), (0, 0, 0, 9), (9, 0, 0, 0)):
        given = [x.to(device) for x in random_case(groups)]
        assert torch.equal(step(*given), function(*given, backend=backend))
    assert len(traces) == 1


@backends("cuda")
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("groups, n", [((5, 0, 3, 1), 2100), ((40, 0, 30), 1600)])
def test_blocks_of_32_columns_give_the_bits_of_blocks_of_16(backend, dtype, groups, n):
    x, weight, offsets = random_case(groups, n, 72, dtype)
    wide = run(x, weight, offsets, backend=backend)
    parts = [run(x, part, offsets, backend=backend) for part in weight.split(400, dim=1)]
    assert torch.equal(torch.cat(parts, dim=1), wide)


@backends("emulation")
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize(
    "groups, count, blocks",
    [
        pytest.param((30, 0, 1, 9), 4, 2 * (4 + 36 // 32), id="tiles of 32 x 128"),
        pytest.param((64, 0, 0, 65, 1), 4, 2 * (5 + 125 // 64), id="tiles of 64 x 128"),
        pytest.param((64, 0, 0, 65, 1), 20, 4 * (5 + 125 // 64), id="tiles of 64 x 64"),
        pytest.param((130, 0, 1, 128), 1, 2 * (4 + 255 // 128), id="tiles of 128 x 128"),
    ],
)
def test_wide_tiles_give_the_bits_of_thin_linear(counted, multiprocessors, dtype, groups, count, blocks):
    given = random_case(groups, 200, 200, dtype)
    multiprocessors(10**6)
    expected = alone(*given, backend="cuda")
    multiprocessors(count)
    out = []
    counters = counted(lambda: out.append(run(*given, backend="cuda")))
    assert counters["launches"] == 1 and counters["blocks"] == blocks
    assert torch.equal(out[0], expected)


@backends("emulation")
@each_dtype
def test_weights_of_experts_without_rows_are_not_read(counted, dtype):
    x, weight, offsets = random_case((0, 4, 0, 0, 9, 0, *[0] * 60), 48, 128, dtype)
    counters = counted(lambda: run(x, weight, offsets, backend="cuda"))
    assert counters["launches"] == 1
    if dtype != torch.float32:
        # Tiles of 8 rows: expert 1 has one, expert 4 two. 3 blocks of 16 columns each.
        tiles, columns = 3, 3
        bytes_of_weights = tiles * 48 * 128 * 2
        assert counters["async_bytes"] == bytes_of_weights + columns * tiles * 8 * 128 * 2
        assert counters["matrix_products"] == tiles * columns * 128 // 16


@backends("emulation")
@each_dtype
def test_the_grid_has_room_for_any_partition_and_does_not_depend_on_it(counted, dtype):
    x, weight, _ = random_case((26,), 20, 64, dtype)
    weight = torch.randn(9, 20, 64).to(dtype)
    blocks = set()
    partitions = [(26, *[0] * 8), (*[0] * 8, 26), (2, *[3] * 8), (*[1] * 8, 18), (9, 0, 8, 0, 9, 0, 0, 0, 0)]
    for groups in partitions:
        given = x, weight, offsets_of(groups)
        assert torch.equal(run(*given, backend="cuda"), alone(*given, backend="cuda")), groups
        blocks.add(counted(lambda given=given: run(*given, backend="cuda"))["blocks"])
    assert len(blocks) == 1


@backends("emulation")
def test_offsets_past_the_rows_end_the_launch():
    x, weight, offsets = random_case((3, 5))
    offsets[-1] = 9
    with pytest.raises(RuntimeError, match="offsets must run from 0 to M and not decrease"):
        dispatch.operator("grouped_linear", "cuda")(x, weight, offsets)
