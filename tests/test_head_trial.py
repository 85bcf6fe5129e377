"""Whether an order head is asked under "auto": by what it brought and cost. No clock is read here."""

from __future__ import annotations

import pytest

from simsd.engine.head_trial import TRIES, TURN, HeadTrial

FIRST = 2 * TRIES * TURN  # iterations of the first comparison


def asked(trial: HeadTrial, iterations: int, steps: dict[bool, int], seconds: dict[bool, float]) -> list[bool]:
    """Whether it was, in each iteration."""
    made = []
    for _ in range(iterations):
        used = trial.next()
        trial.observe(used, steps[used], seconds[used])
        made.append(used)
    return made


@pytest.mark.parametrize(
    "steps, seconds, worth",
    [
        ((4, 3), (1.0, 1.0), True),
        ((4, 3), (1.6, 1.0), False),  # it costs more than it brings
        ((3, 4), (1.0, 1.0), False),
        ((100, 105), (1.0, 1.0), True),  # as good as equal
    ],
)
def test_the_faster_of_the_two_is_kept(steps, seconds, worth):
    steps, seconds = ({True: x, False: y} for x, y in (steps, seconds))
    made = asked(HeadTrial(), 40 * FIRST, steps, seconds)
    assert made[:FIRST].count(True) == FIRST / 2
    assert made[FIRST:].count(worth) > 0.95 * len(made[FIRST:])


def test_the_slower_one_is_tried_again_less_and_less_and_taken_when_it_became_the_faster():
    trial = HeadTrial()
    made = asked(trial, 400 * FIRST, {True: 2, False: 4}, {True: 1.0, False: 1.0})
    early, late = made[FIRST : 100 * FIRST].count(True), made[301 * FIRST :].count(True)
    assert early > late > 0
    made = asked(trial, 800 * FIRST, {True: 5, False: 4}, {True: 1.0, False: 1.0})
    assert made[-FIRST:].count(True) > FIRST / 2


def test_iterations_that_told_nothing_decide_nothing():
    trial = HeadTrial()
    made = [trial.next() for _ in range(4 * FIRST)]
    assert made[FIRST:].count(True) > 0.8 * len(made[FIRST:])
