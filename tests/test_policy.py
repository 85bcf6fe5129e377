"""What the automatic drafter spends, given times and acceptance: no clock is read here."""

from __future__ import annotations

import pytest
import torch

from simsd import GenerationConfig
from simsd.policy import FIRST_WAIT, Choice, Experience, Line, Policy


def policy(base: float = 2e-3, slope: float = 25e-6, draft: float = 4e-4, lanes: int = 1, **changes) -> Policy:
    """A policy that has seen forwards of these times."""
    made = Policy(GenerationConfig(**changes), 4, lanes, Experience(torch.device("cpu")), 0.2)
    for rows in (4, 64, 16, 100) * 5:
        made.target.see(rows, base + slope * rows)
        made.draft.see(rows, draft + 1e-6 * rows)
    return made


def feed(made: Policy, kind: str, share: float, times: int = 30, lane: int = 0) -> None:
    """The lane's drafts of this kind were right in `share` of their tokens, and of their blocks."""
    for _ in range(times):
        made.see(lane, kind, 4, round(4 * share), round(3 * share), share > 0.5, 20)


def test_a_line_is_recovered_from_what_was_seen():
    line = Line(1 / 80)
    for rows in (4, 64, 16, 100) * 5:
        line.see(rows, 2e-3 + 25e-6 * rows)
    assert line.base == pytest.approx(2e-3, rel=0.02) and line.slope == pytest.approx(25e-6, rel=0.05)


@pytest.mark.parametrize("noise", [0.0, 50.0])
def test_a_line_stays_sane_whatever_it_sees(noise):
    line = Line(1 / 80)
    assert line.base > 0 and line.slope > 0
    for n in range(20):
        line.see(8, 1e-3 * (1 + noise * (n % 7 == 3)))
    assert 0 < line.slope < line.base
    assert line.base + 8 * line.slope == pytest.approx(1e-3, rel=0.1)


def test_a_good_draft_looks_further_ahead_than_a_poor_one():
    good, poor = policy(lookahead=4), policy(lookahead=4)
    feed(good, "model", 1.0)
    feed(poor, "model", 0.25)
    assert good.choose([9], [False], True).depth == [4]
    assert poor.choose([9], [False], True).depth[0] < 4
    assert good.choose([2], [False], True).depth == [2]  # no further than the text may go


def test_a_draft_that_never_helps_is_asked_less_and_less():
    made = policy()
    asked = []
    for n in range(400):
        choice = made.choose([9], [False], True)
        if choice.kind[0] == "model":
            asked.append(n)
            made.see(0, "model", 1, 0, 0, False, 20)
    gaps = [b - a for a, b in zip(asked, asked[1:], strict=False)]
    assert len(asked) < 40 and gaps[-1] > FIRST_WAIT


def test_a_draft_too_slow_for_what_it_brings_is_not_asked():
    made = policy(draft=20e-3)
    feed(made, "model", 1.0)
    assert made.choose([9], [False], True).kind == ["none"]


def test_the_target_s_own_logits_are_used_where_they_are():
    made = policy()
    assert made.choose([9], [True], False).kind == ["self"]
    assert made.choose([9], [False], False).kind == ["none"]


def test_rows_that_bring_too_little_are_not_spent():
    made = policy(lanes=8)
    for _ in range(30):
        made.see(0, "self", 4, 1, 1, False, 60)
    assert made.choose([9], [True], False).kind == ["self"]  # a step saved is worth 60 rows
    assert made.choose([9] * 8, [True] * 8, False).kind[0] == "none"  # an eighth of a forward is not


def test_without_a_record_the_draft_model_is_tried():
    assert policy().choose([9], [False], True).kind == ["model"]


def test_rows_cost_more_in_a_batch():
    made = policy(lanes=8)
    assert 0 < made.floor(1) < made.floor(2) < made.floor(8) < 1


def test_an_explicit_row_budget_replaces_the_floor():
    assert policy(max_rows=64).floor(8) == 0.0


def test_trust_follows_acceptance_by_lane():
    made = policy(lanes=2)
    feed(made, "self", 1.0, lane=0)
    feed(made, "self", 0.0, lane=1)
    sure, unsure = made.trust(Choice(["self", "self"], [0, 0]))
    assert sure > 0.85 and unsure < 0.4


@pytest.mark.parametrize("drafter, has_self, kind, depth", [("model", True, "model", 2), ("self", True, "self", 0)])
def test_a_named_drafter_is_always_used(drafter, has_self, kind, depth):
    made = policy(drafter=drafter)
    feed(made, kind, 0.0)
    choice = made.choose([9], [has_self], True)
    assert (choice.kind, choice.depth, made.trust(choice)) == ([kind], [depth], [1.0])
