"""Whether a text repeats itself, as its tokens come."""

from __future__ import annotations

import pytest

from simsd.engine.repeats import Repeats

TEXTS = [
    ([1, 2, 3, 4, 1, 2, 3], (), True),
    ([1, 2, 3, 4, 2, 3], (), False),
    ([1, 2, 3, 4, 1, 2], (3, None, 9, None), True),
    ([1, 2, 3, 4, 1, 2], (None, 3, None, None), False),
    ([1, 2, 3, 4], (1, 2, 3), True),
    ([7, 7, 7], (), False),
    ([7, 7, 7, 7], (), True),
    ([], (), False),
    ([1], (1, 1, None, None), False),
]


@pytest.mark.parametrize(("tokens", "provisional", "repeats"), TEXTS, ids=str)
def test_three_tokens_that_stood_there_before_are_a_repetition(tokens, provisional, repeats):
    assert Repeats()(tokens, provisional) is repeats


def test_a_text_is_followed_as_it_grows():
    text = [5, 6, 7, 8, 9, 5, 6, 7, 8, 1, 6, 7, 8]
    repeats = Repeats()
    assert [repeats(text[:n]) for n in range(len(text) + 1)] == [n in (8, 9, 13) for n in range(len(text) + 1)]
