"""What the automatic drafter spends, given times and what drafts brought: no clock is read here."""

from __future__ import annotations

import pytest
import torch

from simsd import GenerationConfig
from simsd.policy import FIRST_PATIENCE, NONE, OWN, Experience, Line, Policy, Way

MODEL, FURTHER, OWN_FURTHER = Way("model", 1), Way("model", 2), Way("self", 2)


def policy(base: float = 2e-3, slope: float = 25e-6, draft: float = 4e-4, lanes: int = 1, **changes) -> Policy:
    """A policy that has seen forwards of these times."""
    made = Policy(GenerationConfig(**changes), 4, lanes, Experience(torch.device("cpu")))
    for rows in (4, 64, 16, 100) * 5:
        made.target.see(rows, base + slope * rows)
        made.draft.see(rows, draft + 1e-6 * rows)
    return made


def teach(made: Policy, way: Way, extra: int, rows: int, masked: int = 0, active: int = 1) -> None:
    """Ways of drafting brought `extra` steps for so many rows."""
    for _ in range(20):
        record = made.experience.record(active, -(-4 * masked // 4), way)
        record.see(extra=extra, rows=rows, forwards=way.depth - (way.kind == "self" and way.depth > 0))


def teach_all(made: Policy, model: int, further: int, own: int, own_further: int, active: int = 1) -> None:
    """Steps brought by each way: on a fresh block by the model's, behind a step by the target's own."""
    teach(made, MODEL, model, 28, active=active)
    teach(made, FURTHER, further, 60, active=active)
    for masked in (1, 2, 3):
        teach(made, OWN, own, 20, masked, active)
        teach(made, OWN_FURTHER, own_further, 60, masked, active)


def test_a_line_is_recovered_from_what_was_seen():
    line = Line(1 / 80)
    for rows in (4, 64, 16, 100) * 5:
        line.see(rows, 2e-3 + 25e-6 * rows)
    assert line.base == pytest.approx(2e-3, rel=0.02) and line.slope == pytest.approx(25e-6, rel=0.05)


@pytest.mark.parametrize("slow", [(), (0,), (3, 10, 17)], ids=["steady", "slow at first", "hiccups"])
def test_a_line_stays_sane_whatever_it_sees(slow):
    line = Line(1 / 80)
    assert line.base > 0 and line.slope > 0
    for n in range(20):
        line.see(8, 50e-3 if n in slow else 1e-3)
    assert 0 < line.slope < line.base
    assert line.base + 8 * line.slope == pytest.approx(1e-3, rel=0.01)


def test_every_way_is_tried_before_any_is_judged():
    made = policy()
    for masked, ways in ((0, {MODEL, FURTHER}), (2, {OWN, OWN_FURTHER})):
        tried = set()
        for _ in range(4):
            (way,) = made.choose([9], [masked], True)
            tried.add(way)
            made.see(0, 1, 0, 0, 20, way.depth)
        assert tried == ways
    assert made.choose([9], [0], False) == [NONE]


def test_a_good_draft_looks_further_ahead_than_a_poor_one():
    good, poor = policy(), policy()
    teach_all(good, model=3, further=6, own=1, own_further=1)
    teach_all(poor, model=2, further=2, own=0, own_further=0)
    assert good.choose([9], [0], True) == [FURTHER]
    assert poor.choose([9], [0], True) == [MODEL]
    assert good.choose([1], [0], True) == [MODEL]  # no further than the text may go


def test_a_draft_that_never_helps_is_asked_less_and_less():
    made = policy()
    asked = []
    for n in range(2000):
        (way,) = made.choose([9], [0], True)
        if way.kind == "model":
            asked.append(n)
            made.see(0, 1, 0, 0, 20, way.depth)
    gaps = [b - a for a, b in zip(asked, asked[1:], strict=False)]
    assert len(asked) < 20 and max(gaps) > 4 * FIRST_PATIENCE


def test_a_draft_too_slow_for_what_it_brings_is_not_asked():
    made = policy(draft=20e-3)
    teach_all(made, model=3, further=6, own=0, own_further=0)
    assert made.choose([9], [0], True) == [NONE]
    assert made.choose([9], [2], True) == [NONE]


def test_a_batch_waits_for_the_target_s_own_logits_where_the_draft_model_costs_too_many_rows():
    made = policy(lanes=8)
    teach_all(made, model=3, further=6, own=2, own_further=3)
    teach_all(made, model=1, further=1, own=2, own_further=2, active=8)
    assert made.choose([9] + [0] * 7, [0] * 8, True)[0] == FURTHER
    assert made.choose([9] * 8, [0] * 8, True) == [NONE] * 8
    assert made.choose([9] * 8, [3] * 8, True) == [OWN] * 8


def test_rows_that_bring_too_little_are_not_spent():
    made = policy(lanes=8)
    for active in (1, 8):
        teach(made, OWN, 1, 60, masked=2, active=active)
    assert made.choose([9] + [0] * 7, [2] * 8, False)[0] == OWN  # a step saved is worth more than 60 rows
    assert made.choose([9] * 8, [2] * 8, False)[0] == NONE  # an eighth of a forward is not


def test_rows_cost_more_in_a_batch():
    made = policy(lanes=8)
    floors = []
    for active in (1, 2, 8):
        made.choose([9] * active + [0] * (8 - active), [0] * 8, False)
        floors.append(made.floor())
    assert 0 < floors[0] < floors[1] < floors[2] < 1


def test_an_explicit_row_budget_replaces_the_floor():
    assert policy(max_rows=64).floor() == 0.0


def test_trust_follows_acceptance_by_lane():
    made = policy(lanes=2)
    made.ways = [OWN, OWN]
    for _ in range(30):
        made.see(0, 4, 4, 2, 20, 0)
        made.see(1, 4, 0, 0, 20, 0)
    sure, unsure = made.trust()
    assert sure > 0.85 and unsure < 0.4


@pytest.mark.parametrize("drafter, masked, way", [("model", 2, FURTHER), ("self", 2, OWN), ("self", 0, NONE)])
def test_a_named_drafter_is_always_used(drafter, masked, way):
    made = policy(drafter=drafter)
    teach_all(made, model=0, further=0, own=0, own_further=0)
    assert made.choose([9], [masked], True) == [way] and made.trust() == [1.0]
