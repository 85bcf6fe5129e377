"""thin_linear is a linear layer, and no row of it notices the others."""

import os
import subprocess
import sys

import pytest
import torch

from arguments import Pick, relaid
from backends import FLOATS, backends, callable_of, device_of, each_dtype, needs_compiled_ops, sized
from simsd_kernels import dispatch
from simsd_kernels.thin_linear import reference

thin_linear = callable_of("thin_linear")
LANES = ("x",)
# (N, K) around the vectors' and tiles' widths.
SIZES = [(1, 1), (5, 3), (4, 16), (6, 17), (33, 100), (7, 333), (130, 257), (64, 128)]


def random_case(shape=(7,), n=33, k=100, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, k, generator=generator).to(dtype)
    return x, torch.randn(n, k, generator=generator).to(dtype)


def int8_case(shape=(7,), n=33, k=100, dtype=torch.float32, seed=0):
    """x, weight, scale."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, k, generator=generator).to(dtype)
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    return x, weight, 0.001 + 0.02 * torch.rand(n, generator=generator)


each_weight = pytest.mark.parametrize("case_of", [random_case, int8_case], ids=["", "int8"])


def good_arguments() -> dict:
    return dict(zip(("x", "weight"), random_case(), strict=True))


def random_arguments(seed: int) -> dict:
    """Rows around the tiles of 8, 16, 32 and 64. K of whole pieces of 16 bytes, whole chunks, one chunk more than there
    are warps, several rounds of chunks; and not."""
    pick = Pick(seed)
    rows = pick(1, 2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 63, 64, 65, 90)
    k = pick(1, 7, 8, 16, 24, 32, 63, 64, 65, 72, 100, 128, 200, 256, 257, 512, 520, 577, 600, 640, 1100)
    n, dtype, case_of = pick(1, 5, 15, 16, 17, 31, 32, 33, 70), pick(*FLOATS), pick(random_case, random_case, int8_case)
    x, weight, *scale = case_of((rows,), n, k, dtype, seed)
    made = {"x": relaid(x, pick), "weight": relaid(weight, pick)}
    return made | ({"scale": relaid(scale[0].to(pick(dtype, torch.float32)), pick)} if scale else {})


def assert_right(out, x, weight, scale=None) -> None:
    """No sum of K float32 terms errs by more; then the result is rounded once, and where there is a scale once more."""
    each = torch.ones(len(weight)) if scale is None else scale
    exact = x.double() @ weight.double().T * each
    magnitude = x.double().abs() @ weight.double().abs().T * each
    terms = x.shape[-1] + (scale is not None)
    bound = terms * torch.finfo(torch.float32).eps * magnitude + torch.finfo(x.dtype).eps * exact.abs()
    assert out.dtype == x.dtype and out.shape == exact.shape
    assert ((out.double() - exact).abs() <= bound).all()


def test_it_is_the_linear_layer_and_rows_are_alone(backend, seed):
    x, weight, *scale = random_arguments(seed).values()
    got = thin_linear(x, weight, *scale, backend=backend)
    assert_right(got, x, weight, *scale)
    plain = torch.clone(weight, memory_format=torch.contiguous_format)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(x), generator=generator)
    assert torch.equal(thin_linear(x[order].contiguous(), plain, *scale, backend=backend), got[order]), "order, strides"
    count = int(torch.randint(1, len(x) + 1, (), generator=generator))
    assert torch.equal(thin_linear(x[-count:], plain, *scale, backend=backend), got[-count:]), "number of rows"
    row = int(order[0])
    first = int(torch.randint(len(weight), (), generator=generator))
    own = slice(first, first + 1)
    alone = thin_linear(x[row].contiguous(), plain[own].clone(), *(each[own] for each in scale), backend=backend)
    assert torch.equal(alone, got[row, own]), "alone"


@each_dtype
@each_weight
@pytest.mark.parametrize("n, k", SIZES)
def test_it_is_the_linear_layer(backend, dtype, case_of, n, k):
    given = case_of((13,), n, k, dtype)
    assert_right(thin_linear(*given, backend=backend), *given)


@each_dtype
def test_an_int8_weight_has_the_bits_of_its_values_in_the_dtype_of_x_and_one_scale_at_the_end(backend, dtype):
    """Where no sum is rounded: backends may add an int8 weight's products in an order of its own."""
    for seed, (rows, n, k) in enumerate(sized([(1, 33, 100), (7, 70, 333), (40, 17, 640)], interpreted=[(7, 33, 100)])):
        x, weight, scale = int8_case((rows,), n, k, dtype, seed)
        x = (4 * x).round()
        powers = 2.0 ** torch.arange(n).remainder(9).sub(9)  # exact in every dtype, and so are weights times them
        got = thin_linear(x, weight, powers, backend=backend)
        assert torch.equal(got, thin_linear(x, (weight * powers[:, None]).to(dtype), backend=backend))
        assert torch.equal(got, thin_linear(x, weight, powers.to(dtype), backend=backend)), "the scale's dtype"
        sums = thin_linear(x.float(), weight.float(), backend=backend)
        scaled = sums * scale
        if dtype == torch.bfloat16 and backend == "triton" and dispatch.interpreting():
            scaled = (scaled.view(torch.int32) & -0x10000).view(torch.float32)  # it cuts off where hardware rounds
        assert torch.equal(thin_linear(x, weight, scale, backend=backend), scaled.to(dtype))


@each_dtype
@each_weight
@pytest.mark.parametrize("n, k", SIZES)
def test_rows_do_not_notice_how_many_they_are(backend, dtype, case_of, n, k, threads):
    rows = {"cpu": 512, "triton": 17}.get(backend, 64)
    x, *weight = case_of((rows,), n, k, dtype)
    threads(1)
    alone = torch.cat([thin_linear(row, *weight, backend=backend) for row in x.split(1)])
    sizes = sized([*range(1, 71), 128, 512], interpreted=[1, 2, 8, 9, 16, 17])
    for count in (1,) if backend in ("triton", "cuda") else (1, 2):
        threads(count)
        for m in sizes:
            if m > rows:
                continue
            got = thin_linear(x[rows - m :], *weight, backend=backend)
            assert torch.equal(got, alone[rows - m :]), f"{m} rows, {count} threads"


@backends("reference", "cpu", "cuda")
@each_weight
def test_rows_do_not_notice_the_threads(backend, case_of, threads):
    for rows in (128, 4):  # enough work for every thread
        given = case_of((rows,), 640, 256)
        threads(1)
        alone = thin_linear(*given, backend=backend)
        for count in (2, 3):
            threads(count)
            assert torch.equal(thin_linear(*given, backend=backend), alone)


def test_rows_do_not_notice_their_place_and_company(backend):
    x, weight = random_case((40,))
    expected = thin_linear(x, weight, backend=backend)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(thin_linear(x[order], weight, backend=backend), expected[order])
    in_a_batch = thin_linear(x.reshape(5, 8, -1), weight, backend=backend)
    assert torch.equal(in_a_batch.reshape(40, -1), expected)
    poisoned = x.clone()
    poisoned[::3] = torch.tensor([float("nan"), float("inf"), -1e38, 0.0]).repeat(25)
    got = thin_linear(poisoned, weight, backend=backend)
    assert torch.equal(got[1::3], expected[1::3]) and torch.equal(got[2::3], expected[2::3])
    assert got[::3].isnan().all()


@each_weight
def test_outputs_do_not_notice_the_other_weight_rows(backend, case_of):
    x, *weight = case_of((9,), 70)
    expected = thin_linear(x, *weight, backend=backend)
    for first, last in ((0, 1), (3, 10), (69, 70)):
        part = thin_linear(x, *(each[first:last] for each in weight), backend=backend)
        assert torch.equal(part, expected[:, first:last])


@each_dtype
@each_weight
def test_strides_change_nothing(backend, dtype, case_of):
    x, weight, *scale = case_of((4, 6), dtype=dtype)
    expected = thin_linear(x, weight, *scale, backend=backend)
    wide = torch.stack((x, x), dim=-1)[..., 0]
    turned = x.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    for view in (wide, turned, x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert not view.is_contiguous()
        assert torch.equal(thin_linear(view, weight, *scale, backend=backend), expected)
    column_major = weight.T.contiguous().T
    padded = torch.nn.functional.pad(weight, (3, 2))[:, 3:-2]
    for view in (column_major, padded):
        assert torch.equal(thin_linear(x, view, *scale, backend=backend), expected)
    for each in scale:
        apart = torch.stack((each, torch.full_like(each, float("nan"))), 1)[:, 0]
        assert torch.equal(thin_linear(x, weight, apart, backend=backend), expected)
    repeated = x[:1].expand(4, 6, 100)
    got = thin_linear(repeated, weight, *scale, backend=backend)
    assert torch.equal(got, expected[:1].expand(4, 6, 33))


@pytest.mark.parametrize("shape, n, k", [((0,), 5, 4), ((3,), 0, 4), ((2, 0), 5, 4), ((0,), 0, 0)])
@each_dtype
@each_weight
def test_empty_sizes_are_fine(backend, dtype, case_of, shape, n, k):
    got = thin_linear(*case_of(shape, n, k, dtype), backend=backend)
    assert got.shape == (*shape, n)


@each_dtype
@each_weight
def test_a_sum_over_nothing_is_zero(backend, dtype, case_of):
    given = case_of((3,), 5, 0, dtype)
    assert torch.equal(thin_linear(*given, backend=backend), torch.zeros(3, 5, dtype=dtype))


def test_reference_in_parts_is_the_same(monkeypatch):
    x, weight = random_case()
    whole = thin_linear(x, weight, backend="reference")
    monkeypatch.setattr(reference, "MAX_PRODUCTS", 1000)
    assert torch.equal(thin_linear(x, weight, backend="reference"), whole)


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
        "        w, scale = torch.randint(-128, 128, (n, k), dtype=torch.int8), torch.rand(n)\n"
        "        for m in (1, 2, 3, 6, 7, 70):\n"
        "            sums = simsd_kernels.thin_linear(x[:m].float(), w.float())\n"
        "            got = simsd_kernels.thin_linear(x[:m], w, scale)\n"
        "            assert torch.equal(got, (sums * scale).to(dtype)), (dtype, n, k, m)\n"
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
    ("weight", torch.zeros(33, 100).bfloat16(), TypeError, "weight must be torch.float32 or torch.int8, got torch.bf"),
    ("weight", torch.zeros(33, 100, dtype=torch.uint8), TypeError, "weight must be torch.float32 or torch.int8, got"),
    ("weight", torch.zeros(33, 100, dtype=torch.int8), TypeError, "scale must be a tensor where weight is torch.int8"),
    ("scale", torch.ones(33), TypeError, "scale must be left out unless weight is torch.int8, got one with torch.f"),
    ("weight", torch.zeros(33, 100, device="meta"), ValueError, "one device.*weight on meta"),
]


SCALES_REFUSED = [
    (1.0, TypeError, "scale must be a tensor where weight is torch.int8, got float"),
    (torch.tensor(1.0), ValueError, r"scale must be \[N\] = \[33\], got \[\]"),
    (torch.ones(32), ValueError, r"scale must be \[N\] = \[33\], got \[32\]"),
    (torch.ones(33, 1), ValueError, r"scale must be \[N\] = \[33\], got \[33, 1\]"),
    (torch.ones(33).half(), TypeError, "scale must be torch.float32 or torch.bfloat16, got torch.float16"),
    (torch.ones(33).double(), TypeError, "scale must be torch.float32 or torch.bfloat16, got torch.float64"),
    (torch.ones(33, dtype=torch.int8), TypeError, "scale must be torch.float32 or torch.bfloat16, got torch.int8"),
    (torch.ones(33, device="meta"), ValueError, "one device.*scale on meta"),
]


@pytest.mark.parametrize("scale, error, message", SCALES_REFUSED)
def test_a_scale_that_fits_no_int8_weight_is_refused(backend, scale, error, message):
    x, weight, _ = int8_case(dtype=torch.bfloat16)
    with pytest.raises(error, match=message):
        thin_linear(x, weight, scale, backend=backend)
    if backend in ("cpu", "cuda") and torch.is_tensor(scale) and scale.device.type != "meta":
        device = device_of(backend)
        with pytest.raises(RuntimeError, match=message):
            dispatch.operator("thin_linear", backend)(*(each.to(device) for each in (x, weight, scale)))


@each_weight
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "with gradients"])
def test_opcheck(case_of, gradients):
    given = [value.requires_grad_(gradients and value.is_floating_point()) for value in case_of((2, 5))]
    torch.library.opcheck(torch.ops.simsd.thin_linear, given)


def test_gradients_are_those_of_the_linear_layer(backend):
    ours = [value.requires_grad_() for value in random_case((2, 5))]
    torchs = [value.detach().clone().requires_grad_() for value in ours]
    thin_linear(*ours, backend=backend).square().sum().backward()
    torch.nn.functional.linear(*torchs).square().sum().backward()
    for mine, theirs in zip(ours, torchs, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-3, rtol=1e-3)


def test_an_int8_weight_passes_gradients_on_to_x_and_the_scale(backend):
    x, weight, scale = int8_case((2, 5))
    ours, torchs = ([value.clone().requires_grad_() for value in (x, scale)] for _ in range(2))
    thin_linear(ours[0], weight, ours[1], backend=backend).square().sum().backward()
    torch.nn.functional.linear(torchs[0], weight * torchs[1][:, None]).square().sum().backward()
    for mine, theirs in zip(ours, torchs, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-3, rtol=1e-3)


@each_dtype
def test_a_scale_of_nan_infinity_or_zero_is_its_columns_alone(backend, dtype):
    x, weight, scale = int8_case((20,), 40, 100, dtype)
    expected = thin_linear(x, weight, scale, backend=backend)
    scale[[3, 7, 39]] = torch.tensor([float("nan"), float("inf"), 0.0])
    got = thin_linear(x, weight, scale, backend=backend)
    others = [i for i in range(40) if i not in (3, 7, 39)]
    assert torch.equal(got[:, others], expected[:, others])
    assert got[:, 3].isnan().all() and got[:, 7].isinf().all() and not got[:, 39].any()


@each_dtype
@pytest.mark.parametrize("k", [72, 100])
def test_nan_and_infinity_stay_in_their_rows_and_columns(backend, dtype, k):
    x, weight = random_case((20,), 40, k, dtype)
    expected = thin_linear(x, weight, backend=backend)
    x[3], x[11, 5], x[19, -1] = float("nan"), float("inf"), float("-inf")
    weight[7], weight[39, 0] = float("nan"), float("inf")
    got = thin_linear(x, weight, backend=backend)
    clean_rows = [i for i in range(20) if i not in (3, 11, 19)]
    clean_columns = [i for i in range(40) if i not in (7, 39)]
    assert torch.equal(got[clean_rows][:, clean_columns], expected[clean_rows][:, clean_columns])
    assert not got[[3, 11, 19]].isfinite().any() and not got[:, [7, 39]].isfinite().any()


@backends("cuda")
@each_dtype
@each_weight
def test_no_number_of_rows_changes_a_bit(backend, dtype, case_of):
    x, *weight = case_of((300,), 33, 592, dtype)
    alone = torch.cat([thin_linear(row, *weight, backend=backend) for row in x[:70].split(1)])
    for rows in (*range(1, 71), 127, 128, 129, 192, 255, 256, 257, 300):
        got = thin_linear(x[:rows], *weight, backend=backend)
        assert torch.equal(got[:70], alone[:rows]), f"{rows} rows"


@backends("cuda")
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@each_weight
@pytest.mark.parametrize("rows, n", [(1, 8200), (8, 8192), (9, 3100), (31, 3072), (64, 3073), (70, 3072)])
def test_blocks_of_32_columns_give_the_bits_of_blocks_of_16(backend, dtype, case_of, rows, n):
    x, weight, *scale = case_of((rows,), n, 144, dtype)
    wide = thin_linear(x, weight, *scale, backend=backend)
    all_parts = zip(*(each.split(1024) for each in (weight, *scale)), strict=True)
    parts = [thin_linear(x, *part, backend=backend) for part in all_parts]
    assert torch.equal(torch.cat(parts, dim=1), wide)
    off = torch.nn.functional.pad(weight, (1, 0))[:, 1:]
    assert torch.equal(thin_linear(x, off, *scale, backend=backend), wide), "element by element"


@backends("triton")
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@each_weight
def test_tiles_of_many_rows_give_the_bits_of_rows_alone(backend, dtype, case_of):
    from simsd_kernels.thin_linear import triton

    x, weight, *scale = case_of((33,), 6100, 270, dtype)
    (many, _), (one, _) = (triton.configuration(dtype, rows, len(weight), weight.dtype) for rows in (33, 1))
    assert many["ROWS"] > one["ROWS"] and many["STEP"] == one["STEP"]
    got = thin_linear(x, weight, *scale, backend=backend)
    assert_right(got, x, weight, *scale)
    last = weight[-400:], *(each[-400:] for each in scale)
    for row in (0, 31, 32):
        assert torch.equal(thin_linear(x[row], *last, backend=backend), got[row, -400:])


FEW, MANY = 1, 10**6  # multiprocessors: the widest tiles suffice; none does, which leaves thin ones of 64 rows


@backends("emulation")
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@each_weight
@pytest.mark.parametrize("k", [16, 144, 592, 1168])  # 1, 3, 10 and 19 chunks of 64: 1, 3, 5 and 7 segments
@pytest.mark.parametrize(
    "rows, n, count, blocks",
    [
        pytest.param(17, 136, FEW, 2, id="17 rows, tiles of 32 x 128"),
        pytest.param(32, 136, FEW, 2, id="32 rows, tiles of 32 x 128"),
        pytest.param(33, 136, FEW, 2, id="33 rows, tiles of 64 x 128"),
        pytest.param(300, 200, 12, 10, id="300 rows, tiles of 64 x 128"),
        pytest.param(300, 200, 16, 20, id="300 rows, tiles of 64 x 64"),
        pytest.param(65, 129, FEW, 2, id="65 rows, tiles of 128 x 128"),
        pytest.param(300, 203, FEW, 6, id="300 rows, tiles of 128 x 128"),
    ],
)
def test_wide_tiles_give_the_bits_of_thin_ones(counted, multiprocessors, dtype, case_of, k, rows, n, count, blocks):
    given = case_of((rows,), n, k, dtype)
    multiprocessors(MANY)
    expected = thin_linear(*given, backend="cuda")
    assert_right(expected, *given)
    multiprocessors(count)
    out = []
    counters = counted(lambda: out.append(thin_linear(*given, backend="cuda")))
    assert counters["launches"] == 1 and counters["blocks"] == blocks
    assert torch.equal(out[0], expected)


@backends("emulation")
def test_rows_of_a_prefill_have_the_bits_of_rows_alone(multiprocessors):
    x, weight = random_case((2048,), 130, 136, torch.bfloat16)
    multiprocessors(132)
    thin = thin_linear(x, weight, backend="cuda")
    multiprocessors(FEW)
    assert torch.equal(thin_linear(x, weight, backend="cuda"), thin)
    for row in (0, 1000, 2047):
        assert torch.equal(thin_linear(x[row], weight, backend="cuda"), thin[row])


@backends("emulation")
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@each_weight
def test_the_weight_is_read_once_and_products_serve_eight_rows(counted, dtype, case_of):
    """Per block of 16 columns: the weight once, x once; a product per 16 k, 16 columns and 8 rows. A row alone is
    copied by the lanes of 8."""
    for rows, tiles in ((1, 1), (8, 1), (16, 2), (32, 4), (64, 8)):
        x, weight, *scale = case_of((rows,), 48, 1024, dtype)
        counters = counted(lambda given=(x, weight, *scale): thin_linear(*given, backend="cuda"))
        assert counters["launches"] == 1 and counters["blocks"] == 3
        assert counters["async_bytes"] == weight.numel() * weight.element_size() + 3 * tiles * 8 * 1024 * 2
        assert counters["matrix_products"] == 3 * 64 * tiles
