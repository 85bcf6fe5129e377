"""Choices sorted by expert: a stable sort, its inverse and the experts' shares, whatever is chosen."""

from __future__ import annotations

import pytest
import torch

from arguments import Pick, relaid
from backends import CASES, backends, callable_of, device_of, sized
from simsd_kernels import dispatch

sort_by_expert = callable_of("sort_by_expert")
LANES = ()
CASES = {**CASES, "triton": sized(60, interpreted=40)}
# (M, C, experts)
SIZES = [(1, 1, 1), (1, 8, 128), (3, 2, 5), (33, 1, 7), (17, 8, 9), (64, 8, 128), (300, 4, 33), (40, 3, 300)]


def random_case(tokens=17, choices=3, n_experts=9, seed=0) -> dict:
    """Distinct experts for every token where there are enough."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, max(n_experts, choices), generator=generator)
    return {"experts": scores.topk(choices, dim=1).indices % n_experts, "n_experts": n_experts}


def good_arguments() -> dict:
    return random_case()


def random_arguments(seed: int) -> dict:
    pick = Pick(seed)
    tokens, choices = pick(0, 1, 3, 17, 31, 32, 33, 64, 130, sized(300, interpreted=97)), pick(1, 2, 3, 8)
    given = random_case(tokens, choices, pick(1, 2, 4, 5, 8, 31, 33, 60, 128), seed)
    match pick("even", "even", "few", "one"):
        case "few":
            given["experts"] = given["experts"] % max(1, given["n_experts"] // 8)
        case "one":
            given["experts"] = torch.full_like(given["experts"], given["n_experts"] // 2)
    return given | {"experts": relaid(given["experts"], pick)}


def assert_sorted(out, experts: torch.Tensor, n_experts: int) -> None:
    """Each property by itself, in plain Python."""
    tokens, choices = experts.shape
    offsets, rows, places = (x.tolist() for x in out)
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in out)
    entries = [(int(experts[m, c]), m, c) for m in range(tokens) for c in range(choices)]
    assert len(offsets) == n_experts + 1
    assert offsets == [sum(expert < e for expert, *_ in entries) for e in range(n_experts + 1)]
    ranks = {entry: place for place, entry in enumerate(sorted(entries))}
    assert rows == [m for _, m, _ in sorted(entries)]
    assert places == [[ranks[int(experts[m, c]), m, c] for c in range(choices)] for m in range(tokens)]


def test_golden_values(backend):
    out = sort_by_expert(torch.tensor([[3, 1], [1, 0], [3, 2]]), n_experts=5, backend=backend)
    assert out.offsets.tolist() == [0, 1, 3, 4, 6, 6]
    assert out.rows.tolist() == [1, 0, 1, 2, 0, 2]
    assert out.places.tolist() == [[4, 1], [2, 0], [5, 3]]


def test_choices_are_sorted_as_the_reference_sorts_them(backend, seed):
    given = random_arguments(seed)
    out, expected = sort_by_expert(**given, backend=backend), sort_by_expert(**given, backend="reference")
    assert all(map(torch.equal, out, expected))


@pytest.mark.parametrize("tokens, choices, n_experts", SIZES)
def test_choices_are_sorted_by_expert_then_token(backend, tokens, choices, n_experts):
    for seed in range(sized(3, interpreted=1)):
        given = random_case(tokens, choices, n_experts, seed)
        assert_sorted(sort_by_expert(**given, backend=backend), **given)


@pytest.mark.parametrize("expert", [0, 4, 8])
def test_one_expert_may_take_all(backend, expert):
    given = {"experts": torch.full((50, 2), expert), "n_experts": 9}
    out = sort_by_expert(**given, backend=backend)
    assert_sorted(out, **given)
    assert out.rows.tolist() == [m for m in range(50) for _ in range(2)]


def test_strides_change_nothing(backend):
    given = random_case()
    experts, expected = given["experts"], sort_by_expert(**given, backend=backend)
    for view in (experts.T.contiguous().T, torch.stack((experts, experts + 99), -1)[..., 0]):
        assert not view.is_contiguous()
        out = sort_by_expert(view, n_experts=9, backend=backend)
        assert all(map(torch.equal, out, expected))
    repeated = experts[:1].expand(6, 3)
    assert_sorted(sort_by_expert(repeated, n_experts=9, backend=backend), repeated, 9)


@pytest.mark.parametrize("tokens, choices", [(0, 3), (4, 0), (0, 0)])
def test_empty_sizes_are_fine(backend, tokens, choices):
    given = {"experts": torch.zeros(tokens, choices, dtype=torch.int64), "n_experts": 3}
    out = sort_by_expert(**given, backend=backend)
    assert out.offsets.tolist() == [0] * 4 and out.rows.shape == (0,) and out.places.shape == (tokens, choices)


REFUSED = [
    ("experts", None, TypeError, "experts must be a tensor, got NoneType"),
    ("experts", torch.zeros(3, dtype=torch.int64), ValueError, r"experts must be \[M, C\] = \[any, any\], got \[3\]"),
    ("experts", torch.zeros(3, 2, dtype=torch.int32), TypeError, "experts must be torch.int64, got torch.int32"),
    ("n_experts", 2.0, TypeError, "n_experts must be an integer, got 2.0"),
    ("n_experts", 0, ValueError, "n_experts must be at least 1, got 0"),
]
OUTSIDE = [(9, 9), (-1, 9), (2**40, 9), (3, 3)]  # an expert, of how many


@pytest.mark.parametrize("expert, n_experts", OUTSIDE)
def test_an_expert_that_does_not_exist_is_refused(expert, n_experts):
    experts = torch.zeros(4, 2, dtype=torch.int64)
    experts[2, 1] = expert
    with pytest.raises(ValueError, match=rf"experts must be in .* = \[0, {n_experts}\), got {expert}"):
        sort_by_expert(experts, n_experts=n_experts)


@backends("cpu", "cuda")
def test_compiled_op_checks_values_itself(backend):
    call, experts = dispatch.operator("sort_by_expert", backend), random_case()["experts"].to(device_of(backend))
    for n_experts in (0, 2**31):
        with pytest.raises(RuntimeError, match="sort_by_expert: "):
            call(experts, n_experts)
    for expert, n_experts in OUTSIDE if backend == "cpu" else ():
        with pytest.raises(RuntimeError, match=f"experts must be .*got {expert}"):
            call(torch.full((3, 2), expert), n_experts)


@backends("cuda")
def test_an_expert_that_does_not_exist_gets_no_place_and_moves_nobody(backend):
    experts = torch.tensor([[1, 7], [-1, 0], [2**40, 1]]).to(device_of(backend))
    offsets, rows, places = dispatch.operator("sort_by_expert", backend)(experts, 3)
    assert offsets.tolist() == [0, 1, 3, 3] and rows[:3].tolist() == [1, 0, 2]
    assert places[0, 0] == 1 and places[1, 1] == 0 and places[2, 1] == 2


@backends("emulation")
def test_one_launch_needs_no_atomic(counted):
    counters = counted(lambda: sort_by_expert(**random_case(64, 8, 128), backend="cuda"))
    assert counters["launches"] == 1 and counters["blocks"] == 32
