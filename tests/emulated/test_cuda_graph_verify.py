"""The CUDA kernels of block_verify.graph, run on the CPU: the reference's walk over the same draws, bit for bit."""

from __future__ import annotations

import json
import math

import pytest
import torch

import simsd_kernels
from backends import unsafe
from simsd_kernels.block_verify import graph_reference
from test_graph_verify import REFUSED, STRATEGIES, good_arguments, random_case
from walks import COMMITTED, FINISHED, ORDER, TAKEN, arguments, ints


def walk(made, backend="cuda"):
    return simsd_kernels.block_verify_graph(**made, backend=backend)


@pytest.fixture
def same_draws(monkeypatch):
    """The reference draws as the kernels do."""
    monkeypatch.setattr(
        graph_reference, "sample_logits", lambda *given: simsd_kernels.sample_logits(*given, backend="cuda")
    )


def assert_same_walk(made):
    before = {name: value.clone() for name, value in made.items() if torch.is_tensor(value)}
    out, expected = walk(made), walk(made, "reference")
    for name, value, wanted in zip(out._fields, out, expected, strict=True):
        assert value.dtype == wanted.dtype
        if name == "prob":  # NaN equals NaN
            value, wanted = value.view(torch.int32), wanted.view(torch.int32)
        assert torch.equal(value, wanted), name
    assert all(torch.equal(made[name], value) for name, value in before.items())
    return out


def strided(made):
    return {
        name: torch.stack((value, value), dim=-1)[..., 0] if torch.is_tensor(value) else value
        for name, value in made.items()
    }


@pytest.mark.parametrize("number", range(300))
def test_random_graphs_of_drafts_that_mostly_agree(same_draws, number):
    case = random_case(number)
    made = {name: case[name] for name in ORDER}
    if number % 4 == 1:  # a row of logits for many positions: their statistics are equal
        shared = made["rows"] % max(1, made["target_logits"].shape[0] // 3)
        made["rows"] = torch.where(made["rows"] < 0, made["rows"], shared)
    out = assert_same_walk(strided(made) if number % 3 == 0 else made)
    by_cpu = walk(made, "cpu")
    for name, value, wanted in zip(out._fields, out, by_cpu, strict=True):
        if name == "prob":
            torch.testing.assert_close(value, wanted, rtol=5e-6, atol=5e-6)
        else:
            assert torch.equal(value, wanted), name


# The draft's graph takes every entropy for 0: only at a bound of 0 do both reveal one position per step.
THRESHOLDS = dict.fromkeys(STRATEGIES, 0.3) | {"entropy_bounded": 0.0}


def sampled(batch):
    return {"temperature": torch.tensor([0.0, 0.8])[torch.arange(batch) % 2]}


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("length, steps", [(6, 6), (7, 3), (8, 5), (9, 2), (33, 12)])
def test_longer_blocks(same_draws, strategy, length, steps):
    settings = {"strategy": strategy, "threshold": THRESHOLDS[strategy], "max_copies": 48, **sampled(2)}
    out = assert_same_walk(arguments(2, 2, length, steps, length, **settings))
    assert (out.progress[:, TAKEN] > 1).any()


@pytest.mark.parametrize("threshold", [None, 0.5, 1e-3, math.inf])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_blocks_of_64_use_the_sign_bit_and_reach_the_next_block(same_draws, strategy, threshold):
    threshold = THRESHOLDS[strategy] if threshold is None else threshold
    settings = {"strategy": strategy, "threshold": threshold, "max_copies": 12, **sampled(2)}
    known = torch.tensor([-(2**63), -8])  # one position and all but three
    out = assert_same_walk(arguments(2, 1, 64, 24, 1, known=known, step=ints(0, 23), **settings))
    assert out.revealed[0] < 0 or out.progress[0, FINISHED]
    assert out.progress[1, FINISHED] >= 1


@pytest.mark.parametrize("foreign", [1, 31, 32, 600])
def test_walk_goes_on_beyond_the_copies_that_are_compared_at_once(same_draws, foreign):
    """The current state first, all others behind copies of blocks that are not the walk's."""
    made = arguments(length=2, ahead=2)
    fillers = {"rows": -1, "states": 0, "revealed": 0, "block": -1}
    for name, filler in fillers.items():
        first, rest = made[name][:, :1], made[name][:, 1:]
        middle = first.new_full((1, foreign, *first.shape[2:]), filler)
        made[name] = torch.cat((first, middle, rest), dim=1)
    assert assert_same_walk(made).progress[0, COMMITTED] == 2


def test_first_of_equal_copies_is_visited(same_draws):
    made = arguments(length=2, ahead=2)
    for name in ("rows", "states", "revealed", "block"):
        made[name] = made[name].repeat_interleave(3, dim=1)
    assert assert_same_walk(made).progress[0, COMMITTED] == 2


@pytest.mark.parametrize("number", range(0, 300, 15))
def test_sequence_walks_the_same_alone_and_in_company(number):
    case = random_case(number)
    made = {name: case[name] for name in ORDER}
    whole = walk(made)
    shared = ("target_logits", "banned_ids", "schedule")
    for b in range(made["states"].shape[0]):
        alone = {
            name: value[b : b + 1] if torch.is_tensor(value) and name not in shared else value
            for name, value in made.items()
        }
        assert all(torch.equal(x[0], y[b]) for x, y in zip(walk(alone), whole, strict=True))


def counted(call):
    torch.ops.simsd_emulated.take_counters()
    call()
    return json.loads(torch.ops.simsd_emulated.take_counters())


def test_logits_are_read_for_masked_positions_of_copies_in_lanes_that_walk():
    made = arguments(batch=3, start=ints(4, -1, 8))
    # Rows of whole 16-byte pieces, so that all loads are counted.
    logits = torch.nn.functional.pad(made["target_logits"], (0, 2), value=-math.inf)
    made["target_logits"] = logits
    bits = torch.arange(4)
    wanted = (made["revealed"][:, :, None] >> bits & 1 == 0) & (made["block"] >= 0)[:, :, None]
    wanted &= (made["block"][:, :1] >= 0)[:, :, None]
    rows = logits[made["rows"][wanted].long()]
    count = rows.shape[0]
    assert 0 < count < wanted.numel()
    given = (torch.zeros(count), ints(*[0] * count), torch.ones(count), *torch.zeros(3, count, dtype=torch.int64))
    needed = counted(lambda: simsd_kernels.sample_logits(rows, *given[:4], given[4].int(), given[5], backend="cuda"))
    found = counted(lambda: walk(made))
    assert found["loaded_bytes"] == needed["loaded_bytes"] > 0
    assert found["launches"] == needed["launches"] + 2


def test_kernel_checks_shapes_and_dtypes_itself():
    good = good_arguments()
    # Any length of schedule will do; what other ops check as well may be told otherwise.
    refused = [*(x for x in unsafe(REFUSED, good) if x[0] != "schedule"), ("strategy", "greedy")]
    assert len(refused) > 15
    for name, value in refused:
        errors = []
        for library in (torch.ops.simsd, torch.ops.simsd_emulated):
            with pytest.raises(RuntimeError, match=r"block_verify.graph: ") as caught:
                library.block_verify.graph(**{**good, name: value})
            errors.append(str(caught.value).splitlines()[0])
        assert errors[0] == errors[1], name


@pytest.mark.parametrize("name", ["block", "cleaned", "depth", "step", "start", "revealed"])
@pytest.mark.parametrize("value", [-(2**31), -1, 3, 2**31 - 1])
def test_kernel_survives_any_number_and_the_definition_agrees(same_draws, name, value):
    made = good_arguments()
    made[name] = torch.full_like(made[name], value)
    made["target_logits"] = made["target_logits"][:1]
    made["rows"] = torch.zeros_like(made["rows"])
    out = torch.ops.simsd_emulated.block_verify.graph(**made)
    expected = graph_reference.block_verify_graph(**made)
    for n, (value, wanted) in enumerate(zip(out, expected, strict=True)):
        assert torch.equal(value, wanted), f"output {n}"
