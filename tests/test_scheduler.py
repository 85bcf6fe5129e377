"""Who is served when, in which slot, and whose a late report is."""

from __future__ import annotations

import pytest

import simsd
from replays import PROMPTS
from simsd import SamplingParams
from simsd.decode.exchange import SlotReport
from simsd.engine.pages import PagePool
from simsd.engine.prefixes import PrefixCache
from simsd.engine.request import Request
from simsd.engine.scheduler import Occupant, Scheduler
from simsd.engine.tuner import Situation
from stand_ins import random_sdar


def request(prompt: int = 6, new: int = 8, **params) -> Request:
    return Request(0, [1] * prompt, SamplingParams(max_new_tokens=new, **params), 0, (), None)


def occupant(epoch: int = 1, **params) -> Occupant:
    return Occupant(request(**params), epoch, [], [], 4, (0, 0), 4, 4)


def test_the_lowest_free_slot_is_next():
    scheduler = Scheduler(3, PrefixCache(PagePool(8), 16, 4))
    assert scheduler.free_slot() == 0
    scheduler.slots[0], scheduler.slots[1] = occupant(1), occupant(2)
    assert scheduler.free_slot() == 2
    scheduler.slots[2] = occupant(3)
    assert scheduler.free_slot() is None
    scheduler.slots[1] = None
    assert scheduler.free_slot() == 1
    assert [(slot, one.epoch) for slot, one in scheduler.occupied] == [(0, 1), (2, 3)]


def test_there_is_something_to_do_while_anyone_waits_or_runs():
    scheduler = Scheduler(2, PrefixCache(PagePool(8), 16, 4))
    assert not scheduler
    scheduler.queue(request())
    assert scheduler
    scheduler.slots[1] = occupant()
    scheduler.waiting.pop()
    assert scheduler
    scheduler.slots[1] = None
    assert not scheduler


def test_a_late_report_is_not_taken_for_the_successor_s():
    scheduler = Scheduler(2, PrefixCache(PagePool(8), 16, 4))
    epochs = [scheduler.next_epoch() for _ in range(3)]
    assert len(set(epochs)) == 3 and min(epochs) > 0  # 0 is that of a slot that never was opened
    scheduler.slots[1] = occupant(epochs[0])
    assert scheduler.occupant(1, epochs[0]) is scheduler.slots[1]
    scheduler.slots[1] = occupant(epochs[1])
    assert scheduler.occupant(1, epochs[0]) is None and scheduler.occupant(0, epochs[0]) is None


def test_an_occupant_is_as_it_was_last_reported():
    one = occupant()
    report = SlotReport(1, [], 1, 0, 0, 1, False, False, [], 3, 2, 8, 5)
    one.take(report, 4)
    assert (one.pending, one.draft_lag, one.masked, one.standing, one.draft_forwards) == (0, 8, 3, 2, 5)


@pytest.mark.parametrize(
    ("prompt", "new", "committed", "left"),
    [(6, 8, 0, 3), (6, 10, 0, 3), (8, 8, 0, 2), (8, 9, 0, 3), (6, 8, 2, 2), (6, 8, 6, 1), (0, 1, 0, 1)],
)
def test_blocks_that_are_left_count_the_current_one(prompt, new, committed, left):
    """Blocks of 4: 6 + 8 tokens end in the fourth, of which the prompt fills the first."""
    one = occupant(prompt=prompt, new=new)
    one.request.commit([2] * committed, [1] * committed, [1.0] * committed, [0.0] * committed, ["denoised"] * committed)
    assert one.situation(4).blocks_left == left


@pytest.mark.parametrize(
    ("params", "drafter"),
    [
        ({}, "auto"),
        ({"drafter": "self"}, "self"),
        ({"drafter": "lookup"}, "lookup"),
        ({"verify": "none", "drafter": "self"}, "none"),
        ({"verify": "temporal"}, "none"),
    ],
    ids=str,
)
def test_drafts_are_chosen_only_where_they_are_verified_exactly(params, drafter):
    one = occupant(**params)
    one.masked, one.standing = 2, 1
    assert one.situation(4) == Situation(drafter, 3, 2, 1, drafter == "auto")  # its prompt repeats one token
    # While the draft model lacks a part of the prompt, the target drafts for itself where it may.
    one.has_draft = False
    assert one.situation(4) == Situation("self" if drafter == "auto" else drafter, 3, 2, 1)


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_first_come_is_first_served(slots):
    engine = simsd.Engine(random_sdar(0), max_batch=slots, max_length=64)
    numbers = [engine.add(prompt, max_new_tokens=8, end_token_ids=(), verify="none") for prompt in PROMPTS]
    begun = []
    for update in engine.stream():
        if update.index not in begun:
            begun.append(update.index)
    assert begun == numbers
