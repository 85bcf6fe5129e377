"""The Triton kernel of block_verify.graph against the reference: same walk, same statistics, bit for bit."""

from __future__ import annotations

import math
import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
import simsd_kernels  # noqa: E402
from simsd_kernels.block_verify import graph_reference, graph_triton  # noqa: E402
from simsd_kernels.sample_logits.triton import sample_logits  # noqa: E402
from test_graph_verify import STRATEGIES, random_case  # noqa: E402
from walks import COMMITTED, FINISHED, ORDER, TAKEN, arguments, ints  # noqa: E402


def walk(made, backend="triton"):
    return simsd_kernels.block_verify_graph(**made, backend=backend)


@pytest.fixture(autouse=True)
def torch_draws(monkeypatch):
    """Torch draws for both, so that not even the probabilities may differ, and in less time than an interpreter."""
    monkeypatch.setattr(graph_triton, "sample_logits", graph_reference.sample_logits)


def assert_same_walk(made):
    out, expected = walk(made), walk(made, "reference")
    for name, value, wanted in zip(out._fields, out, expected, strict=True):
        assert value.dtype == wanted.dtype
        if name == "prob":  # NaN equals NaN
            value, wanted = value.view(torch.int32), wanted.view(torch.int32)
        assert torch.equal(value, wanted), name
    return out


@pytest.mark.parametrize("number", range(48))
def test_random_graphs_of_drafts_that_mostly_agree(number):
    case = random_case(number)
    assert_same_walk({name: case[name] for name in ORDER})


def sampled(batch):
    return {"temperature": torch.tensor([0.0, 0.8])[torch.arange(batch) % 2]}


@pytest.mark.parametrize("strategy, threshold", zip(STRATEGIES, (0.0, 0.0, 0.6, 0.0), strict=True))
def test_walks_over_what_the_triton_sampler_draws(monkeypatch, strategy, threshold):
    drawn = []

    def draw(*given):
        drawn.append(sample_logits(*given))
        return drawn[-1]

    made = arguments(2, 1, 4, max_copies=9, strategy=strategy, threshold=threshold, **sampled(2))
    by_torch = walk(made)
    monkeypatch.setattr(graph_triton, "sample_logits", draw)
    monkeypatch.setattr(graph_reference, "sample_logits", lambda *_: drawn[0])
    out = assert_same_walk(made)
    assert len(drawn) == 1 and (out.progress[:, TAKEN] > 1).any()
    for name, value, wanted in zip(out._fields, out, by_torch, strict=True):
        if name == "prob":
            torch.testing.assert_close(value, wanted, rtol=5e-6, atol=5e-6)
        else:
            assert torch.equal(value, wanted), name


# The draft's graph takes every entropy for 0: only at a bound of 0 do both reveal one position per step.
THRESHOLDS = dict.fromkeys(STRATEGIES, 0.3) | {"entropy_bounded": 0.0}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("length, steps", [(6, 6), (7, 3), (8, 5), (9, 2)])
def test_longer_blocks(strategy, length, steps):
    settings = {"strategy": strategy, "threshold": THRESHOLDS[strategy], "max_copies": 48, **sampled(2)}
    out = assert_same_walk(arguments(2, 2, length, steps, length, **settings))
    assert (out.progress[:, TAKEN] > 1).any()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_blocks_of_64_use_the_sign_bit_and_reach_the_next_block(strategy):
    settings = {"strategy": strategy, "threshold": THRESHOLDS[strategy], "max_copies": 12, **sampled(2)}
    known = torch.tensor([-(2**63), -8])  # one position and all but three
    out = assert_same_walk(arguments(2, 1, 64, 24, 1, known=known, step=ints(0, 23), **settings))
    assert out.revealed[0] < 0 and out.progress[1, FINISHED] >= 1


def synthetic(number, length, batch=8):
    """One copy per lane in which anything is possible, and what the target is to draw there: ties, NaN, infinities."""
    generator = torch.Generator().manual_seed(number)

    def any_of(*values):
        return torch.tensor(values)[torch.randint(len(values), (batch, 1, length), generator=generator)]

    made = arguments(batch, 0, length, 3, number, start=torch.arange(batch, dtype=torch.int32), max_copies=1)
    made["rows"] = torch.zeros_like(made["rows"])
    made["target_logits"] = torch.zeros(1, 30)
    made["step"] = torch.randint(0, 3, (batch,), generator=generator, dtype=torch.int32)
    made["revealed"] = torch.randint(-(2**63), 2**63 - 1, (batch, 1), generator=generator)
    made["revealed"] &= torch.randint(-(2**63), 2**63 - 1, (batch, 1), generator=generator)
    made["schedule"] = torch.randint(0, 4, (3,), generator=generator, dtype=torch.int32)
    drawn = (
        torch.randint(0, 30, (batch, 1, length), generator=generator),
        any_of(0.0, 0.3, 0.6, 0.6000001, 1.0, math.nan),
        any_of(-math.inf, -2.0, -0.0, 0.0, 0.5, 3.0, math.inf, math.nan),
        any_of(0.0, 1e-12, 0.1, 0.1, 0.25, 2.0, math.nan, math.inf),
    )
    return made, drawn


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, math.inf])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("length", [5, 64])
def test_any_statistics_reveal_the_same_positions(monkeypatch, length, strategy, threshold):
    made, drawn = synthetic(length, length)
    monkeypatch.setattr(graph_reference, "actions", lambda *_: drawn)
    out = assert_same_walk(made | {"strategy": strategy, "threshold": threshold})
    assert (out.revealed != 0).any()


def test_walk_goes_on_beyond_the_copies_that_are_compared_at_once():
    """The current state first, all others behind 600 copies of blocks that are not the walk's."""
    made = arguments(length=2, ahead=2)
    foreign = {"rows": -1, "states": 0, "revealed": 0, "block": -1}
    for name, filler in foreign.items():
        first, rest = made[name][:, :1], made[name][:, 1:]
        middle = first.new_full((1, 600, *first.shape[2:]), filler)
        made[name] = torch.cat((first, middle, rest), dim=1)
    assert assert_same_walk(made).progress[0, COMMITTED] == 2


def test_tensors_of_any_strides():
    made = arguments(batch=3, **sampled(3))
    strided = {
        name: torch.stack((value, value), dim=-1)[..., 0] if torch.is_tensor(value) else value
        for name, value in made.items()
    }
    assert all(torch.equal(a, b) for a, b in zip(walk(strided), walk(made), strict=True))


@pytest.mark.parametrize("batch, copies, length", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_batches_graphs_and_blocks(batch, copies, length):
    made = arguments(batch=2)
    shapes = {
        **dict.fromkeys(("rows", "states"), (batch, copies, length)),
        **dict.fromkeys(("revealed", "block"), (batch, copies)),
        **dict.fromkeys(("cleaned", "depth", "start", "step", "temperature", "seed"), (batch,)),
        **dict.fromkeys(("step_map", "prob", "origin"), (batch, length)),
        "clean": (batch, 1, length),
    }
    assert_same_walk(made | {name: made[name].new_zeros(shape) for name, shape in shapes.items()})


def test_float64_logits_are_refused_by_name():
    made = arguments()
    with pytest.raises(RuntimeError, match=r"triton: supports float32, bfloat16 and float16, got .*torch.float64"):
        walk(made | {"target_logits": made["target_logits"].double()})
