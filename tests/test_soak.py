"""benchmarks/soak.py in short: it finds nothing, and finds what is wrong."""

from __future__ import annotations

import pathlib
import sys

from simsd.decode.slots import Slots
from simsd.engine.pages import PagePool

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))
import soak  # noqa: E402

SHORT = ["--requests", "80", "--slots", "8"]


def test_texts_are_right_and_no_page_is_lost(one_thread, capsys):
    assert soak.main(SHORT) == 0
    assert "16 pages free at the end" in capsys.readouterr().out


def test_a_wrong_text_is_found(one_thread, capsys, monkeypatch):
    opening, count = Slots.open, []

    def misread(self, slot, tokens, *others):
        count.append(slot)
        if self.count > 1 and len(count) % 5 == 0:
            tokens = [*tokens[:-1], tokens[-1] % 40 + 5]
        return opening(self, slot, tokens, *others)

    monkeypatch.setattr(Slots, "open", misread)
    assert soak.main(SHORT) == 1
    assert "tokens: [" in capsys.readouterr().out


def test_a_lost_page_is_found(one_thread, capsys, monkeypatch):
    retiring, seen = PagePool.retire, []

    def forgetful(self, pages, launched):
        if pages and self.count == 24:  # not the other engine's, of one request at a time
            seen.append(pages)
            if len(seen) % 8 == 0:  # a sleep finds lost ones again
                pages = pages[1:]
        retiring(self, pages, launched)

    monkeypatch.setattr(PagePool, "retire", forgetful)
    assert soak.main(["--requests", "80", "--slots", "12"]) == 1
    assert "are nobody's and not free" in capsys.readouterr().out
