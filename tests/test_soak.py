"""benchmarks/cpu/soak.py in short: it finds nothing, and finds what is wrong."""

from __future__ import annotations

import pytest

from benchmarks import contest
from benchmarks.cpu import soak
from benchmarks.registry import BENCHMARKS
from simsd.decode.slots import Slots
from simsd.engine.pages import PagePool

pytestmark = pytest.mark.usefixtures("one_thread")


def short(**changes):
    made, one = contest.Bench(), BENCHMARKS["soak"]
    settings = one.settings | one.short | changes
    del settings["threads"]
    soak.run(made, **settings)
    return {row["what"]: row["count"] for row in made.rows}


@pytest.mark.parametrize("draft_device", ["", "cpu"], ids=["in turn", "beside"])
def test_texts_are_right_and_no_page_is_lost(draft_device):
    assert short(draft_device=draft_device)["free at the end"] == 16


def test_a_wrong_text_is_found(monkeypatch):
    opening, count = Slots.open, []

    def misread(self, slot, tokens, *others):
        count.append(slot)
        if self.count > 1 and len(count) % 5 == 0:
            tokens = [*tokens[:-1], tokens[-1] % 40 + 5]
        return opening(self, slot, tokens, *others)

    monkeypatch.setattr(Slots, "open", misread)
    with pytest.raises(RuntimeError, match=r"wrong: .*tokens: \["):
        short()


def test_a_lost_page_is_found(monkeypatch):
    retiring, seen = PagePool.retire, []

    def forgetful(self, pages, launched):
        if pages and self.count == 24:  # not the other engine's, of one request at a time
            seen.append(pages)
            if len(seen) % 8 == 0:  # a sleep finds lost ones again
                pages = pages[1:]
        retiring(self, pages, launched)

    monkeypatch.setattr(PagePool, "retire", forgetful)
    with pytest.raises(RuntimeError, match="are nobody's and not free"):
        short(slots=12)


def test_an_engine_that_is_stuck_from_the_start_is_told_as_such(monkeypatch):
    """No request has come to an end by then: there is no first quarter to compare the process's size with."""
    monkeypatch.setattr(soak.Engine, "step", lambda self: [])
    monkeypatch.setattr(soak, "STUCK", 20)
    with pytest.raises(
        RuntimeError, match="wrong: nothing has moved for 20 iterations; 0 of 80 requests came to an end"
    ):
        short()
