"""The residual's sum and its RMSNorm in one call: what transformers' modules compute, rounded as they round it."""

from __future__ import annotations

import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from arguments import Pick, copy_of, relaid
from backends import FLOATS, backends, callable_of, each_dtype, kernels, sized
from roundings import assert_within, normed, roundings, times
from simsd_kernels import dispatch

add_rms_norm = callable_of("add_rms_norm")
LANES = ("residual", "x")
# D around the vectors' widths, and of real models.
DIMS = (1, 5, 16, 33, 64, 160, 250, 1024, 2560)


def random_case(shape=(3, 5), dim=160, dtype=torch.float32, given=True, seed=0) -> dict:
    """Arguments with a residual that has grown, as in a late layer, and weights around 1. `given`: whether x is."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size):
        return torch.randn(size, generator=generator)

    residual = (draw(*shape, dim) * 5).to(dtype)
    x = draw(*shape, dim).to(dtype) if given else None
    return {"x": x, "residual": residual, "weight": (1 + 0.3 * draw(dim)).to(dtype), "eps": 1e-6}


def good_arguments() -> dict:
    return random_case()


def random_arguments(seed: int) -> dict:
    """Rows of whole units of 16 bytes and of broken ones; of a warp, of 4 and of 8; held, and read again."""
    pick = Pick(seed)
    dim = pick(1, 2, 5, 16, 33, 64, 128, 160, 255, 256, 257, 512, 513, 600, 1000, 1024, 1030, 2048, 2056, 4096, 4100,
               5120, 8192, 8193, 9000)  # fmt: skip
    shape = pick((), (0,), (1,), (2, 2)) if dim > 2048 else pick((), (0,), (1,), (7,), (2, 3), (2, 1, 4), (3, 2, 2))
    made = random_case(shape, dim, pick(*FLOATS), pick(True, True, False), seed)
    plain = pick(False, True)  # whole vectors, where the sizes are
    made["residual"] *= pick(1, 1, 1e-3, 100)
    for name in () if plain else ("residual", "weight"):
        made[name] = relaid(made[name], pick)
    if made["x"] is not None:
        repeats = len(shape) > 0 and pick(False, False, True)
        if repeats:
            made["x"] = made["x"][:1].expand_as(made["x"])
        elif not plain:
            made["x"] = relaid(made["x"], pick)
    if len(shape) and shape[0] and pick(False, True):
        made["residual"][0, ..., -1] = float("nan")  # shows in its own row
    return made | {"eps": pick(0.0, 1e-6, 1e-6, 1e-5, 0.5)}


def run(made: dict, backend: str | None = None) -> torch.Tensor:
    return add_rms_norm(**made, backend=backend)


def modules(made: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The normed residual and the residual as a decoder layer of transformers has them."""
    norm = Qwen3RMSNorm(made["weight"].numel(), eps=made["eps"]).to(made["weight"].dtype)
    norm.weight.data.copy_(made["weight"])
    residual = made["residual"] if made["x"] is None else made["residual"] + made["x"]
    with torch.no_grad():
        return norm(residual), residual


def assert_as_modules(out: torch.Tensor, residual: torch.Tensor, before: dict) -> None:
    """The residual exactly; the output too, unless a normed value lies next to a boundary."""
    wanted, summed = modules(before)
    torch.testing.assert_close(residual, summed, rtol=0, atol=0, equal_nan=True)
    allowed = times(roundings(normed(summed, before["eps"]), out.dtype), before["weight"])
    for found in (out, wanted):
        assert_within(allowed, found)
    assert out.is_contiguous()


def check(made: dict, backend: str) -> torch.Tensor:
    before = copy_of(made)
    out = run(made, backend)
    assert_as_modules(out, made["residual"], before)
    return out


def test_golden_values(backend):
    residual = torch.tensor([[3.0, -1.0], [0.0, 0.0]])
    x = torch.tensor([[1.0, -3.0], [6.0, 8.0]])
    out = add_rms_norm(x, residual, torch.tensor([2.0, 0.5]), 0.0, backend=backend)
    assert residual.tolist() == [[4.0, -4.0], [6.0, 8.0]]
    root = 50**0.5  # of the mean of 36 and 64
    torch.testing.assert_close(out, torch.tensor([[2.0, -0.5], [12 / root, 4 / root]]))


def test_rows_are_added_and_normed(backend, seed):
    check(random_arguments(seed), backend)


def test_the_sum_and_the_normed_value_are_rounded_before_they_are_used(backend):
    # In bfloat16 256 + 1 lies halfway between 256 and 258, 256 + 3 between 258 and 260: both go to the even neighbour.
    residual, x = torch.tensor([256.0, 256.0]).bfloat16(), torch.tensor([1.0, 3.0]).bfloat16()
    add_rms_norm(x, residual, torch.ones(2).bfloat16(), backend=backend)
    assert residual.tolist() == [256.0, 260.0]
    # 1 and 5 over their root mean square are .27735 and 1.38675, rounded .27734375 and 1.390625; 7 times what was not
    # rounded would give 1.9453125 and 9.6875.
    residual, weight = torch.tensor([1.0, 5.0]).bfloat16(), torch.tensor([7.0, 7.0]).bfloat16()
    out = add_rms_norm(None, residual, weight, 0.0, backend=backend)
    assert out.tolist() == [1.9375, 9.75]


@each_dtype
@pytest.mark.parametrize("given", [True, False], ids=["x", "no x"])
def test_agrees_with_the_modules_of_transformers(backend, dtype, given):
    for dim in DIMS:
        check(random_case((2, 9), dim, dtype, given, seed=dim), backend)


@each_dtype
def test_reference_is_the_modules_bit_for_bit(dtype):
    for dim in DIMS:
        made = random_case((40,), dim, dtype)
        expected = modules(copy_of(made))
        assert torch.equal(run(made, "reference"), expected[0]) and torch.equal(made["residual"], expected[1])


@kernels
@each_dtype
def test_is_as_close_to_exact_as_the_modules_are(backend, dtype):
    for dim in sized(DIMS, interpreted=DIMS[::3]):
        made = random_case((50,), dim, dtype, seed=dim)
        plain, summed = modules(copy_of(made))
        wide = summed.double()
        exact = made["weight"].double() * wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        allowed = (plain.double() - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
        assert (run(made, backend).double() - exact).abs().max() <= allowed


def test_without_x_the_residual_is_left_as_it_was(backend):
    made = random_case(given=False)
    before = made["residual"].clone()
    out = run(made, backend)
    assert torch.equal(made["residual"], before)
    repeated = made | {"residual": before[:1].expand(3, 5, 160)}  # nothing is written, so it may be expanded
    assert torch.equal(run(repeated, backend), out[:1].expand(3, 5, 160))


@each_dtype
@pytest.mark.parametrize("dim", [*DIMS, 4100])
def test_a_row_is_bit_identical_whatever_rides_along(backend, dtype, dim):
    count = sized(17, interpreted=6)
    made = random_case((count,), dim, dtype)
    alone = copy_of(made)
    out = run(made, backend)
    for rows in (slice(0, 1), slice(3, 5), slice(count - 1, count), slice(2, count)):
        one = copy_of(alone | {name: alone[name][rows] for name in ("x", "residual")})
        assert torch.equal(run(one, backend), out[rows]) and torch.equal(one["residual"], made["residual"][rows])
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    mixed = alone | {name: alone[name][order] for name in ("x", "residual")}
    assert torch.equal(run(mixed, backend), out[order])


@each_dtype
def test_nan_and_infinity_stay_in_their_rows(backend, dtype):
    made = random_case((12,), 100, dtype)
    clean = copy_of(made)
    expected = run(clean, backend)
    made["x"][3, 7], made["residual"][5, 99], made["x"][8] = float("nan"), float("inf"), -1e38
    made["residual"][10] = 0
    made["x"][10] = 0
    out = run(made, backend)
    kept = [0, 1, 2, 4, 6, 7, 9, 11]
    assert torch.equal(out[kept], expected[kept]) and torch.equal(made["residual"][kept], clean["residual"][kept])
    assert out[3].isnan().all() and out[5, 99].isnan() and not out[10].any()
    assert made["residual"][3].isnan().sum() == 1


@kernels
@each_dtype
def test_rows_do_not_notice_the_threads(backend, dtype, threads):
    made = random_case((700 if backend == "cpu" else 9,), 250, dtype)
    found = []
    for count in (1, 2, 3):
        threads(count)
        given = copy_of(made)
        found.append((run(given, backend), given["residual"]))
    assert all(torch.equal(a, b) for later in found[1:] for a, b in zip(found[0], later, strict=True))


@kernels
@each_dtype
def test_any_strides_are_read_and_written_as_they_lie(backend, dtype):
    made = random_case((3, 2, 2), 37, dtype)
    plain = copy_of(made)
    expected = run(plain, backend)
    backing = torch.zeros(4, 3, 4, 40, dtype=dtype)
    views = {
        "a slice": backing[:3, :2, 1:3, 2:39],
        "leading dimensions swapped": torch.empty(2, 3, 2, 37, dtype=dtype).permute(1, 2, 0, 3),
        "D outermost": torch.empty(37, 3, 2, 2, dtype=dtype).permute(1, 2, 3, 0),
        "every other element": torch.empty(3, 2, 2, 74, dtype=dtype)[..., 1::2],
        "contiguous": torch.empty(3, 2, 2, 37, dtype=dtype),
    }
    for x_lies, x in views.items():
        for residual_lies, residual in views.items():
            if x is residual:
                continue
            x.copy_(made["x"])
            residual.copy_(made["residual"])
            weight = torch.stack((made["weight"], made["weight"]), -1)[:, 0]
            out = add_rms_norm(x, residual, weight, backend=backend)
            # The order of a row's sum does not follow from how it lies in memory.
            assert torch.equal(out, expected) and out.is_contiguous(), (x_lies, residual_lies)
            assert torch.equal(residual, plain["residual"]) and torch.equal(x, made["x"]), (x_lies, residual_lies)
    assert not backing[3].any() and not backing[..., 0].any() and not backing[:, 2].any() and not backing[:, :, 3].any()


@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 1, 5)], ids=str)
def test_one_to_four_dimensions(backend, shape):
    out = check(random_case(shape, 24), backend)
    assert out.shape == (*shape, 24)


def test_x_may_be_the_same_for_all_rows(backend):
    made = random_case((6,), 24)
    check(made | {"x": made["x"][:1].expand(6, 24)}, backend)


@pytest.mark.parametrize("shape, dim", [((0,), 5), ((3,), 0), ((2, 0), 5), ((), 0), ((0, 4, 0), 0)])
def test_empty_sizes_are_fine(backend, shape, dim):
    assert run(random_case(shape, dim), backend).shape == (*shape, dim)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2, 3.0])
def test_eps_is_honoured(backend, eps):
    check(random_case() | {"eps": eps}, backend)


REFUSED = [
    ("x", 1.0, TypeError, "x must be a tensor, got float"),
    ("x", torch.zeros(3, 4, 160), ValueError, r"x must have the shape of residual, \[3, 5, 160\], got \[3, 4, 160\]"),
    ("x", torch.zeros(5, 160), ValueError, r"x must have the shape of residual, \[3, 5, 160\], got \[5, 160\]"),
    ("x", torch.zeros(3, 5, 160).half(), TypeError, "x must be torch.float32, got torch.float16"),
    ("x", torch.zeros(3, 5, 160, device="meta"), ValueError, "one device.*x on meta"),
    ("residual", None, TypeError, "residual must be a tensor, got NoneType"),
    ("residual", torch.tensor(1.0), ValueError, r"residual must be \[..., D\] of 1 to 4 dimensions, got \[\]"),
    ("residual", torch.zeros(1, 1, 3, 5, 160), ValueError, r"residual must be .*got \[1, 1, 3, 5, 160\]"),
    ("residual", torch.zeros(3, 5, 160).int(), TypeError, "residual must be torch.float32 or .*got torch.int32"),
    ("weight", torch.ones(8), ValueError, r"weight must be \[D\] = \[160\], got \[8\]"),
    ("weight", torch.ones(160, 1), ValueError, r"weight must be \[D\] = \[160\], got \[160, 1\]"),
    ("weight", torch.ones(160).half(), TypeError, "weight must be torch.float32, got torch.float16"),
]


def test_an_expanded_residual_cannot_be_written_to(backend):
    made = random_case() | {"residual": torch.zeros(3, 1, 160).expand(3, 5, 160)}
    message = "residual is written in place and must not be expanded, got stride 0 in dimension 1"
    with pytest.raises(ValueError, match=message):
        run(made, backend)
    if backend in ("cpu", "cuda"):
        with pytest.raises((RuntimeError, ValueError), match=message):
            dispatch.operator("add_rms_norm", backend)(**made)


@each_dtype
def test_opcheck(dtype):
    for given in (True, False):
        made = random_case(dtype=dtype, given=given)
        torch.library.opcheck(torch.ops.simsd.add_rms_norm, tuple(made.values()))


@backends("triton")
@pytest.mark.parametrize("dim", [1, 160, 4096, 4097, 100000])
def test_the_order_of_the_sum_follows_from_the_size_of_a_row(dim):
    from simsd_kernels.add_rms_norm import triton

    constants, options = triton.configuration(dim)
    assert 1 << constants["LOG_BLOCK"] >= min(dim, triton.LARGEST_BLOCK) and options["num_warps"] in (1, 2, 4, 8)


@kernels
@each_dtype
@pytest.mark.parametrize("dim", [160, 512, 1024, 4096, 8192, 9216])
def test_alignment_does_not_change_a_bit(backend, dtype, dim):
    made = random_case((3,), dim, dtype)
    off = copy_of(made)
    off["residual"] = torch.zeros(3, dim + 1, dtype=dtype)[:, 1:].copy_(made["residual"])
    off["x"] = torch.stack((made["x"], made["x"]), -1)[..., 0]
    assert torch.equal(run(made, backend), run(off, backend)) and torch.equal(made["residual"], off["residual"])


@backends("emulation")
@each_dtype
@pytest.mark.parametrize("dim, rereads", [(160, 0), (512, 0), (1024, 0), (4096, 0), (16384, 1)])
def test_one_launch_reads_every_row_once_and_only_long_ones_twice(counted, dtype, dim, rereads):
    made = random_case((5,), dim, dtype)
    row = dim * dtype.itemsize
    counters = counted(lambda: run(made, "cuda"))
    assert counters["launches"] == 1
    assert counters["loaded_bytes"] == 5 * (3 + rereads) * row  # x, residual, weight
    assert counted(lambda: run(made | {"x": None}, "cuda"))["loaded_bytes"] == 5 * (2 + rereads) * row
