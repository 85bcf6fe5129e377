"""A token's weighted sum over its experts' rows, rounded as transformers rounds it, and no token notices another."""

from __future__ import annotations

import pytest
import torch

from arguments import Pick, relaid
from backends import FLOATS, HAS_GPU, backends, callable_of, each_dtype, sized
from simsd_kernels import dispatch

combine_experts = callable_of("combine_experts")
LANES = ("weights", "places")
# (M, C, N) around the vectors' widths, and of real models.
SIZES = [(1, 1, 1), (3, 2, 5), (2, 8, 16), (9, 3, 33), (5, 4, 77), (4, 8, 2048), (3, 1, 1000)]


def random_case(tokens=9, choices=3, size=33, dtype=torch.float32, seed=0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "y": torch.randn(tokens * choices, size, generator=generator).to(dtype),
        "weights": torch.rand(tokens, choices, generator=generator).to(dtype),
        "places": torch.randperm(tokens * choices, generator=generator).view(tokens, choices).int(),
    }


def good_arguments() -> dict:
    return random_case()


def random_arguments(seed: int) -> dict:
    pick = Pick(seed)
    tokens = pick(*sized((1, 2, 5, 9, 17, 64), interpreted=(1, 2, 5)))
    sizes = tokens, pick(0, 1, 2, 3, 8, 9), pick(1, 3, 8, 33, 64, 448, 768, 1024, 1030)
    given = random_case(*sizes, pick(*FLOATS), seed)
    if pick(False, True):  # rows may be used twice, or by nobody
        given["places"] = given["places"] // 2
    return {name: relaid(x, pick) for name, x in given.items()}


def run(y, weights, places, backend=None) -> torch.Tensor:
    return combine_experts(y, weights, places, backend=backend)


def assert_right(out, y, weights, places) -> None:
    """Products rounded to the dtype, added up in float64, rounded once; float32's own sum may err a little."""
    terms = (y[places.long()] * weights[..., None]).double()
    exact, magnitude = terms.sum(1), terms.abs().sum(1)
    assert out.dtype == y.dtype and out.shape == exact.shape and out.is_contiguous()
    bound = torch.finfo(y.dtype).eps * exact.abs() / 2 + places.shape[1] * torch.finfo(torch.float32).eps * magnitude
    least = torch.finfo(y.dtype).smallest_normal * torch.finfo(y.dtype).eps
    assert ((out.double() - exact).abs() <= bound + least).all()


def test_golden_values(backend):
    y = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0]])
    weights, places = torch.tensor([[0.5, 0.25], [1.0, 2.0]]), torch.tensor([[2, 0], [1, 1]], dtype=torch.int32)
    assert run(y, weights, places, backend).tolist() == [[50.25, 100.5], [30.0, 60.0]]


def test_products_are_rounded_and_the_sum_is_rounded_once(backend):
    # 1.0078125^2 = 1.01568... is 1.015625 in bfloat16; 256 + 1.015625 + 1.015625 = 258.03 rounds to 258, while adding
    # in bfloat16 would leave 256 (257.02 rounds to 256, twice), and unrounded products give the same 258.
    y = torch.tensor([[256.0], [1.0078125], [1.0078125]]).bfloat16()
    weights = torch.tensor([[1.0, 1.0078125, 1.0078125]]).bfloat16()
    assert run(y, weights, torch.tensor([[0, 1, 2]], dtype=torch.int32), backend).item() == 258.0
    # 1.0078125^2 - 1.015625 is 0 if the product was rounded, 6.1e-5 if it was not.
    y = torch.tensor([[1.0078125], [-1.015625]]).bfloat16()
    weights = torch.tensor([[1.0078125, 1.0]]).bfloat16()
    assert run(y, weights, torch.tensor([[0, 1]], dtype=torch.int32), backend).item() == 0.0


def test_the_sum_runs_in_the_order_of_choices(backend):
    y, places = torch.tensor([[2.0**30], [1.0], [-(2.0**30)]]), torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2]]).int()
    assert run(y, torch.ones(3, 3), places, backend).flatten().tolist() == [0.0, 1.0, 0.0]


def test_sums_are_right_and_have_the_bits_of_the_reference(backend, seed):
    given = random_arguments(seed)
    out = run(**given, backend=backend)
    assert_right(out, **given)
    if backend in ("triton", "cuda") and not HAS_GPU:  # whose compiler fuses as it likes
        assert torch.equal(out, run(**given, backend="reference"))


@each_dtype
@pytest.mark.parametrize("tokens, choices, size", SIZES)
def test_it_is_the_weighted_sum(backend, dtype, tokens, choices, size):
    given = random_case(tokens, choices, size, dtype)
    assert_right(run(**given, backend=backend), **given)


@each_dtype
def test_tokens_do_not_notice_their_place_and_company(backend, dtype):
    given = random_case(12, 4, 77, dtype)
    y, weights, places = given.values()
    expected = run(y, weights, places, backend)
    for m in range(12):
        alone = run(y[places[m].long()], weights[m : m + 1], torch.arange(4, dtype=torch.int32)[None], backend)
        assert torch.equal(alone[0], expected[m])
    for first, last in ((0, 1), (3, 40), (64, 77)):
        assert torch.equal(run(y[:, first:last], weights, places, backend), expected[:, first:last])
    y = y.clone()
    y[places[::2].flatten().long()] = float("nan")
    out = run(y, weights, places, backend)
    assert torch.equal(out[1::2], expected[1::2]) and out[::2].isnan().all()


def test_tokens_do_not_notice_the_threads(backend, threads):
    given = random_case(40, 8, 2048) if backend == "cpu" else random_case(5, 3, 100)
    threads(1)
    expected = run(**given, backend=backend)
    for count in (2, 3):
        threads(count)
        assert torch.equal(run(**given, backend=backend), expected)
    assert_right(expected, **given)


@each_dtype
def test_strides_change_nothing(backend, dtype):
    y, weights, places = random_case(dtype=dtype).values()
    expected = run(y, weights, places, backend)
    for view in (y.T.contiguous().T, torch.stack((y, y), -1)[..., 1], torch.nn.functional.pad(y, (1, 2))[:, 1:-2]):
        assert not view.is_contiguous() and torch.equal(run(view, weights, places, backend), expected)
    assert torch.equal(run(y, weights.T.contiguous().T, places.T.contiguous().T, backend), expected)


@pytest.mark.parametrize("tokens, choices, size", [(0, 3, 5), (4, 3, 0), (4, 0, 5)])
def test_empty_sizes_are_fine(backend, tokens, choices, size):
    assert torch.equal(run(**random_case(tokens, choices, size), backend=backend), torch.zeros(tokens, size))


REFUSED = [
    ("y", None, TypeError, "y must be a tensor, got NoneType"),
    ("y", torch.zeros(27), ValueError, r"y must be \[S, N\] = \[any, any\], got \[27\]"),
    ("y", torch.zeros(27, 33).long(), TypeError, "y must be torch.float32.*got torch.int64"),
    ("weights", torch.zeros(9, 2), ValueError, r"weights must be \[M, C\] = \[9, 3\], got \[9, 2\]"),
    ("weights", torch.zeros(9, 3).half(), TypeError, "weights must be torch.float32, got torch.float16"),
    ("weights", torch.zeros(9, 3, device="meta"), ValueError, "one device.*weights on meta"),
    ("places", torch.zeros(27).int(), ValueError, r"places must be \[M, C\]"),
    ("places", torch.zeros(9, 3).long(), TypeError, "places must be torch.int32, got torch.int64"),
]
OUTSIDE = (27, -1, 2**31 - 1)


@pytest.mark.parametrize("place", OUTSIDE)
def test_a_place_outside_of_y_is_refused(backend, place):
    given = random_case()
    given["places"][4, 1] = place
    message = rf"places must be in \[0, S\) = \[0, 27\), got {place}"
    with pytest.raises(ValueError, match=message):
        combine_experts(**given)
    if backend == "cpu":
        with pytest.raises(RuntimeError, match=message):
            dispatch.operator("combine_experts", backend)(**given)


@backends("emulation")
@pytest.mark.parametrize("place", [-1, 27])
def test_a_place_outside_of_y_ends_the_launch(place):
    given = random_case()
    given["places"][3, 2] = place
    with pytest.raises(RuntimeError, match="places must be in"):
        dispatch.operator("combine_experts", "cuda")(**given)


@backends("emulation")
@each_dtype
def test_one_launch_reads_every_row_once(counted, dtype):
    given = random_case(5, 3, 1552, dtype)
    counters = counted(lambda: run(**given, backend="cuda"))
    assert counters["launches"] == 1 and counters["loaded_bytes"] == given["y"].numel() * dtype.itemsize
