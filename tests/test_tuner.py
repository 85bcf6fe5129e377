"""What the automatic drafter spends, given times and what drafts brought: no clock is read here."""

from __future__ import annotations

import pytest
import torch

from simsd import EngineConfig
from simsd.decode.exchange import LOOKUP_DRAFT, MODEL_DRAFT, SELF_DRAFT
from simsd.engine.head_trial import TURN
from simsd.engine.latency import LatencyModel
from simsd.engine.tuner import (
    FIRST_PATIENCE,
    IDLE,
    LOOKUP,
    NONE,
    OWN,
    DraftMode,
    History,
    Situation,
    Tuner,
    history_of,
)

MODEL, FURTHER, OWN_FURTHER = DraftMode(MODEL_DRAFT, 1), DraftMode(MODEL_DRAFT, 2), DraftMode(SELF_DRAFT, 2)


def tuner(base: float = 2e-3, slope: float = 25e-6, draft: float = 4e-4, slots: int = 1, **changes) -> Tuner:
    """A tuner that has seen forwards of these times."""
    made = Tuner(EngineConfig(**changes), 4, slots, History(torch.device("cpu")))
    for rows in (4, 64, 16, 100) * 5:
        made.target.observe(rows, base + slope * rows)
        made.draft.observe(rows, draft + 1e-6 * rows)
    return made


def choose(made: Tuner, blocks_left: list[int], masked: list[int], has_model: bool, drafter: str = "auto"):
    situations = [
        Situation(drafter, left, here) if left else IDLE for left, here in zip(blocks_left, masked, strict=True)
    ]
    return list(made.choose(situations, has_model))


def teach(made: Tuner, mode: DraftMode, extra: int, rows: int, masked: int = 0, active: int = 1) -> None:
    """A draft mode brought `extra` steps for so many rows."""
    for _ in range(20):
        record = made.history.record(active, -(-4 * masked // 4), mode)
        record.observe(extra=extra, rows=rows, forwards=mode.depth - (mode.kind == SELF_DRAFT and mode.depth > 0))


def teach_all(made: Tuner, model: int, further: int, own: int, own_further: int, active: int = 1) -> None:
    """Steps brought by each mode: on a fresh block by the model's, behind a step by the target's own."""
    teach(made, MODEL, model, 28, active=active)
    teach(made, FURTHER, further, 60, active=active)
    for masked in (1, 2, 3):
        teach(made, OWN, own, 20, masked, active)
        teach(made, OWN_FURTHER, own_further, 60, masked, active)


def test_a_latency_model_is_recovered_from_what_was_seen():
    model = LatencyModel(1 / 80)
    for rows in (4, 64, 16, 100) * 5:
        model.observe(rows, 2e-3 + 25e-6 * rows)
    assert model.base == pytest.approx(2e-3, rel=0.02) and model.slope == pytest.approx(25e-6, rel=0.05)


def test_what_judging_costs_besides_its_rows_is_told_apart():
    model = LatencyModel(1 / 80)
    for rows in (4, 64, 16, 100) * 10:
        model.observe(rows, 2e-3 + 25e-6 * rows)
        model.observe(rows + 60, 2e-3 + 25e-6 * (rows + 60) + 0.8e-3, judging=False)
        model.observe(rows + 60, 2e-3 + 25e-6 * (rows + 60) + 2.8e-3, judging=True)  # an order head's evaluation
    assert model.base == pytest.approx(2e-3, rel=0.02) and model.slope == pytest.approx(25e-6, rel=0.05)
    assert model.overhead == pytest.approx(0.8e-3, rel=0.05)


def test_where_judging_costs_more_than_it_saves_nothing_is_drafted():
    made = tuner()
    for _ in range(10):
        made.observe(0, OWN, 4, 1, 0.4, 4, 0)
    saved = made.saved(0, OWN)
    for rows in (4, 64, 16, 100) * 5:
        made.target.observe(rows, 2e-3 + 25e-6 * rows + 2e-3, judging=False)
    assert saved > 0 > made.saved(0, OWN)


@pytest.mark.parametrize("slow", [(), (0,), (3, 10, 17)], ids=["steady", "slow at first", "hiccups"])
def test_a_latency_model_stays_sane_whatever_it_sees(slow):
    model = LatencyModel(1 / 80)
    assert model.base > 0 and model.slope > 0
    for n in range(20):
        model.observe(8, 50e-3 if n in slow else 1e-3)
    assert 0 < model.slope < model.base
    assert model.base + 8 * model.slope == pytest.approx(1e-3, rel=0.01)


def test_every_mode_is_tried_before_any_is_judged():
    made = tuner()
    for masked, modes in ((0, {MODEL, FURTHER}), (2, {OWN, OWN_FURTHER})):
        tried = set()
        for _ in range(4):
            (mode,) = choose(made, [9], [masked], True)
            tried.add(mode)
            made.observe(0, mode, 1, 0, 0, 20, mode.depth)
        assert tried == modes
    assert choose(made, [9], [0], False) == [NONE]


def test_a_good_draft_looks_further_ahead_than_a_poor_one():
    good, poor = tuner(), tuner()
    teach_all(good, model=3, further=6, own=1, own_further=1)
    teach_all(poor, model=2, further=2, own=0, own_further=0)
    assert choose(good, [9], [0], True) == [FURTHER]
    assert choose(poor, [9], [0], True) == [MODEL]
    assert choose(good, [1], [0], True) == [MODEL]  # no further than the text may go


def test_a_draft_that_never_helps_is_asked_less_and_less():
    made = tuner()
    asked = []
    for n in range(2000):
        (mode,) = choose(made, [9], [0], True)
        if mode.kind == MODEL_DRAFT:
            asked.append(n)
            made.observe(0, mode, 1, 0, 0, 20, mode.depth)
    gaps = [b - a for a, b in zip(asked, asked[1:], strict=False)]
    assert len(asked) < 20 and max(gaps) > 4 * FIRST_PATIENCE


def test_a_draft_too_slow_for_what_it_brings_is_not_asked():
    made = tuner(draft=20e-3)
    teach_all(made, model=3, further=6, own=0, own_further=0)
    assert choose(made, [9], [0], True) == [NONE]
    assert choose(made, [9], [2], True) == [NONE]


def test_a_batch_waits_for_the_target_s_own_logits_where_the_draft_model_costs_too_many_rows():
    made = tuner(slots=8)
    teach_all(made, model=3, further=6, own=2, own_further=3)
    teach_all(made, model=1, further=1, own=2, own_further=2, active=8)
    assert choose(made, [9] + [0] * 7, [0] * 8, True)[0] == FURTHER
    assert choose(made, [9] * 8, [0] * 8, True) == [NONE] * 8
    assert choose(made, [9] * 8, [3] * 8, True) == [OWN] * 8


def repeating(made: Tuner, extra: dict[DraftMode, int], iterations: int = 200, masked: int = 2) -> list[DraftMode]:
    """The modes chosen on a text that repeats itself, of which each brings `extra` steps."""
    chosen = []
    for _ in range(iterations):
        (mode,) = made.choose([Situation("auto", 9, masked, repeats=True)], False)
        chosen.append(mode)
        if mode != NONE:
            made.observe(0, mode, 4, extra.get(mode, 0), extra.get(mode, 0), 60 if mode == LOOKUP else 20, 0)
    return chosen


def test_a_text_that_repeats_itself_is_looked_up_where_that_pays():
    assert repeating(tuner(), {LOOKUP: 7, OWN: 2})[-50:].count(LOOKUP) >= 48
    dear = repeating(tuner(slope=1e-3), {LOOKUP: 3, OWN: 2})  # rows of which cost half a forward each
    assert dear[-50:].count(OWN) >= 48
    useless = repeating(tuner(), {OWN: 2}, iterations=2000)
    assert 2 <= useless.count(LOOKUP) < 12


def test_a_text_that_does_not_repeat_itself_costs_no_look():
    made = tuner()
    for masked in (0, 2) * 50:
        (mode,) = choose(made, [9], [masked], False)
        assert mode != LOOKUP
        made.observe(0, mode, 4, 2, 2, 20, 0) if mode != NONE else None
    repeating(made, {LOOKUP: 7, OWN: 2})
    assert choose(made, [9], [2], False) == [OWN]  # what it brought elsewhere is another matter


def test_a_lookup_is_believed_as_far_as_it_was_right():
    """It has no probabilities of its own: the calibration is there for one that was asked for, too."""
    made = tuner(slots=2)
    choose(made, [9, 9], [0, 0], False, "lookup")
    assert made.modes == [LOOKUP, LOOKUP] == [DraftMode(LOOKUP_DRAFT, 0)] * 2
    for _ in range(30):
        made.observe(0, LOOKUP, 8, 8, 7, 60, 0)
        made.observe(1, LOOKUP, 8, 0, 0, 60, 0)
    right, wrong = made.calibration()
    assert right > 0.85 and wrong < 0.4


def test_rows_that_bring_too_little_are_not_spent():
    made = tuner(slots=8)
    for active in (1, 8):
        teach(made, OWN, 1, 60, masked=2, active=active)
    assert choose(made, [9] + [0] * 7, [2] * 8, False)[0] == OWN  # a step saved is worth more than 60 rows
    assert choose(made, [9] * 8, [2] * 8, False)[0] == NONE  # an eighth of a forward is not


def test_rows_cost_more_in_a_batch():
    made = tuner(slots=8)
    floors = []
    for active in (1, 2, 8):
        choose(made, [9] * active + [0] * (8 - active), [0] * 8, False)
        floors.append(made.min_visit_prob())
    assert 0 < floors[0] < floors[1] < floors[2] < 1


def test_an_explicit_row_budget_replaces_the_floor():
    assert tuner(max_rows=64).min_visit_prob() == 0.0


def test_an_order_head_is_asked_where_the_target_drafts_for_itself():
    made = tuner(slots=4)
    choose(made, [2, 2, 0, 2], [2, 0, 0, 3], has_model=False, drafter="self")
    assert made.heads(True) == [True, None, None, True]
    assert made.heads(False) == [None] * 4


def test_one_batch_asks_the_head_for_all_that_auto_decides_for():
    made = tuner(slots=2)
    seen = set()
    for _ in range(2 * TURN):
        choose(made, [2, 2], [2, 2], has_model=False)
        seen.add(tuple(made.heads(True)))
    assert seen == {(True, True), (False, False)}


def test_what_paid_in_blocks_of_one_length_or_with_one_head_says_nothing_of_others():
    model = torch.nn.Linear(1, 1)
    told = [
        history_of(model, None, torch.device("cpu"), False, length, head)
        for length, head in ((4, "auto"), (4, "auto"), (16, "auto"), (4, "mine.safetensors"))
    ]
    assert told[0] is told[1] and len({id(history) for history in told}) == 3


def test_calibration_follows_acceptance_by_slot():
    made = tuner(slots=2)
    choose(made, [9, 9], [2, 2], False)
    assert made.modes == [OWN, OWN]
    for _ in range(30):
        made.observe(0, OWN, 4, 4, 2, 20, 0)
        made.observe(1, OWN, 4, 0, 0, 20, 0)
    sure, unsure = made.calibration()
    assert sure > 0.85 and unsure < 0.4


@pytest.mark.parametrize("drafter, masked, mode", [("model", 2, FURTHER), ("self", 2, OWN), ("self", 0, NONE)])
def test_a_named_drafter_is_almodes_used(drafter, masked, mode):
    made = tuner()
    teach_all(made, model=0, further=0, own=0, own_further=0)
    assert choose(made, [9], [masked], True, drafter) == [mode] and made.calibration() == [1.0]


@pytest.mark.parametrize(
    "rows, masked, peeks", [(128, 8, True), (128, 9, False), (512, 32, True), (16, 1, True), (16, 2, False)]
)
def test_the_next_block_is_looked_at_where_there_are_rows_for_that(rows, masked, peeks):
    made = tuner(max_rows=rows)
    situation = Situation("self", 2, masked)
    made.choose([situation], False)
    assert made.peeks([situation], rows) == [peeks]


def test_no_block_is_looked_at_that_is_not_there_or_that_a_model_drafts():
    made = tuner(max_rows=512)
    for drafter, blocks_left, masked in (("self", 1, 3), ("model", 3, 3), ("none", 3, 3), ("self", 3, 0)):
        situation = Situation(drafter, blocks_left, masked)
        made.choose([situation], True)
        assert made.peeks([situation], 512) == [False]


def test_the_next_block_is_not_looked_at_where_rows_cost_as_much_as_steps():
    made, situation = tuner(slots=64), Situation("self", 3, 2)
    for active in (1, 64):
        teach(made, OWN, 3, 60, masked=2, active=active)
        situations = [situation] * active + [IDLE] * (64 - active)
        made.choose(situations, False)
        assert made.peeks(situations, 128) == [active == 1] + [False] * 63
