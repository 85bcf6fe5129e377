"""The kernels of verify_graph against the definition, on what they might trip over, and what they read."""

import math

import pytest
import torch
from hypothesis import given, settings

from backends import backends, kernels, needs_compiled_ops
from rules import STRATEGIES, even
from simsd_kernels import dispatch
from simsd_kernels.sample_logits import slots
from simsd_kernels.verify_graph import reference
from test_verify_graph import RANDOM, alone, good_arguments, random_case, sample_logits, strided, walk
from walks import FINISHED, HELD, ORDER, RULE, TAKEN, arguments, ints

OP = "verify_graph"


@kernels
@given(case=RANDOM)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_same_walk_as_the_reference(backend, case):
    made = {name: case[name] for name in ORDER}
    for name, value, expected in zip(*(walk(made)._fields, walk(made, backend), walk(made, "reference")), strict=True):
        assert value.dtype == expected.dtype
        if name in ("prob", "draw_logprob"):
            torch.testing.assert_close(value, expected, rtol=5e-6, atol=5e-6)
        else:
            assert torch.equal(value, expected), name


NUMBERS = ("block", "draft_blocks_in_rows", "proposal_depth", "step", "start", "state_revealed", *RULE[:3])


@needs_compiled_ops
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-(2**31), -1, 3, 2**31 - 1])
def test_compiled_op_survives_any_number_and_the_definition_agrees(name, value):
    made = good_arguments()
    made[name] = torch.full_like(made[name], value)
    made["target_logits"] = made["target_logits"][:1]
    made["rows"] = torch.zeros_like(made["rows"])
    out = torch.ops.simsd.verify_graph(**made)
    expected = reference.verify_graph(**made)
    for n, (a, b) in enumerate(zip(out, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=5e-6, atol=5e-6, msg=f"output {n}")


@pytest.fixture
def same_draws(monkeypatch):
    """The reference draws as the kernels do."""
    monkeypatch.setattr(slots, "sample_logits", lambda *given: sample_logits(*given, backend="cuda"))


def assert_same_walk(made):
    before = {name: value.clone() for name, value in made.items() if torch.is_tensor(value)}
    out, expected = walk(made, "cuda"), walk(made, "reference")
    for name, value, wanted in zip(out._fields, out, expected, strict=True):
        assert value.dtype == wanted.dtype
        if name in ("prob", "draw_logprob"):  # NaN equals NaN
            value, wanted = value.view(torch.int32), wanted.view(torch.int32)
        assert torch.equal(value, wanted), name
    assert all(torch.equal(made[name], value) for name, value in before.items())
    return out


def sampled(batch):
    return {"temperature": torch.tensor([0.0, 0.8])[torch.arange(batch) % 2]}


@backends("cuda")
@pytest.mark.parametrize("number", range(300))
def test_random_graphs_of_drafts_that_mostly_agree(same_draws, number):
    case = random_case(number)
    made = {name: case[name] for name in ORDER}
    if number % 4 == 1:  # many positions with the same logits: their statistics are equal
        count = made["target_logits"].shape[0]
        made["target_logits"] = made["target_logits"][torch.arange(count) % max(1, count // 3)]
    out = assert_same_walk(strided(made) if number % 3 == 0 else made)
    by_cpu = walk(made, "cpu")
    for name, value, wanted in zip(out._fields, out, by_cpu, strict=True):
        if name in ("prob", "draw_logprob"):
            torch.testing.assert_close(value, wanted, rtol=5e-6, atol=5e-6)
        else:
            assert torch.equal(value, wanted), name


@backends("cuda")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("length, steps", [(6, 6), (7, 3), (8, 5), (9, 2), (33, 12)])
def test_longer_blocks(same_draws, strategy, length, steps):
    rules = (even(length, steps), strategy, 0.3)
    out = assert_same_walk(arguments(2, 2, length, length, rules=rules, max_states=48, **sampled(2)))
    assert (out.progress[:, TAKEN] > 1).any()


@backends("cuda")
@pytest.mark.parametrize("threshold", [0.3, 0.5, 1e-3, math.inf])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_blocks_of_64_use_the_sign_bit_and_reach_the_next_block(same_draws, strategy, threshold):
    rules = (even(64, 24), strategy, threshold)
    known = torch.tensor([-(2**63), -8])  # one position and all but three
    out = assert_same_walk(
        arguments(2, 1, 64, 1, rules=rules, known=known, step=ints(0, 23), max_states=12, **sampled(2))
    )
    assert out.revealed[0] < 0 or out.progress[0, FINISHED]
    assert out.progress[1, FINISHED] >= 1


@backends("cuda")
@pytest.mark.parametrize("foreign", [1, 31, 32, 600])
def test_walk_goes_on_beyond_the_states_that_are_compared_at_once(same_draws, foreign):
    """The current state first, all others behind places that hold none."""
    made = arguments(length=2)
    fillers = {"rows": -1, "states": 0, "state_revealed": 0, "block": -1}
    for name, filler in fillers.items():
        first, rest = made[name][:, :1], made[name][:, 1:]
        middle = first.new_full((1, foreign, *first.shape[2:]), filler)
        made[name] = torch.cat((first, middle, rest), dim=1)
    assert assert_same_walk(made).progress[0, HELD] == 2


@backends("cuda")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_step_drawn_from_no_row_of_its_own_has_probability_0(strategy):
    """Of positions that share a row against the contract one draws from it; nobody takes the others for draws."""
    made = arguments(rules=(even(4, 1), strategy, 0.3), max_states=1)
    made["rows"] = torch.where(made["rows"] < 0, made["rows"], 0)
    out = walk(made, "cuda")
    assert sorted(out.prob[0, 0].tolist())[:3] == [0.0] * 3 and out.progress[0, FINISHED] == 1
    assert sorted(out.draw_logprob[0, 0].tolist()) == [-math.inf] * 3 + [0.0]
    assert out.tokens[0, 0].count_nonzero() <= 1


@backends("cuda")
@pytest.mark.parametrize("number", range(0, 300, 15))
def test_slot_walks_the_same_alone_and_in_company(number):
    case = random_case(number)
    made = {name: case[name] for name in ORDER}
    whole = walk(made, "cuda")
    for b in range(made["states"].shape[0]):
        assert all(torch.equal(x[0], y[b]) for x, y in zip(walk(alone(made, b), "cuda"), whole, strict=True))


@backends("emulation")
def test_logits_are_read_for_masked_positions_of_states_in_slots_that_walk(counted):
    made = arguments(batch=3, start=ints(4, -1, 8))
    # Rows of whole 16-byte pieces, so that all loads are counted.
    logits = torch.nn.functional.pad(made["target_logits"], (0, 2), value=-math.inf)
    made["target_logits"] = logits
    bits = torch.arange(4)
    wanted = (made["state_revealed"][:, :, None] >> bits & 1 == 0) & (made["block"] >= 0)[:, :, None]
    wanted &= (made["block"][:, :1] >= 0)[:, :, None]
    rows = logits[made["rows"][wanted].long()]
    count = rows.shape[0]
    assert 0 < count < wanted.numel()
    given = (torch.zeros(count), ints(*[0] * count), torch.ones(count), *torch.zeros(3, count, dtype=torch.int64))
    needed = counted(lambda: sample_logits(rows, *given[:4], given[4].int(), given[5], backend="cuda"))
    found = counted(lambda: walk(made, "cuda"))
    assert found["loaded_bytes"] == needed["loaded_bytes"] > 0
    assert found["launches"] == 4  # prepare, two of the draws, walk


@backends("emulation")
def test_launches_and_scratch_do_not_grow_with_the_states(counted):
    made = arguments(batch=3)
    many = made | {
        name: torch.cat((made[name], torch.full_like(made[name], -1).repeat(1, 7, *[1] * (made[name].dim() - 2))), 1)
        for name in ("rows", "states", "state_revealed", "block")
    }
    few = counted(lambda: walk(made, "cuda"))
    more = counted(lambda: walk(many, "cuda"))
    assert few["launches"] == more["launches"] == 4  # prepare, two of the draws, walk
    assert more["blocks"] - few["blocks"] == 3 * 7 * 64 * 4 // 128  # of prepare


@backends("emulation")
@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [-(2**31), -1, 3, 2**31 - 1])
def test_kernel_survives_any_number_and_the_definition_agrees(same_draws, name, value):
    made = good_arguments()
    made[name] = torch.full_like(made[name], value)
    out = dispatch.operator("verify_graph", "cuda")(**made)
    expected = reference.verify_graph(**made)
    for n, (value, wanted) in enumerate(zip(out, expected, strict=True)):
        assert torch.equal(value, wanted), f"output {n}"
