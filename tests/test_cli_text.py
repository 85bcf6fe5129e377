"""What `simsd generate` draws: text that grows, the block on its way, how each token came."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

import byte_pair
from simsd.cli.steps import ORIGINS, statistics, steps_view
from simsd.cli.text import StreamedText, block_text, pieces
from simsd.results import Result, Stats
from terminal import Terminal


def test_pieces_give_a_character_of_several_tokens_to_its_last_one():
    tokenizer = _Wrapper()
    parts = pieces(tokenizer, tokenizer.encode("é 🙂"))
    assert parts == ["", "é", " ", "", "", "", "🙂"]
    assert pieces(tokenizer, tokenizer.encode("ok 🙂")[:-1])[-1] == "\ufffd"


def test_steps_view_keeps_marks_under_their_tokens_at_any_width():
    tokenizer = _Wrapper()
    tokens = [*tokenizer.encode("a漢\nb🙂c"), tokenizer.backend.convert_tokens_to_ids(byte_pair.END)]
    origins = [list(ORIGINS)[i % len(ORIGINS)] for i in range(len(tokens))]
    probs = [i % 10 / 10 for i in range(len(tokens))]
    result = Result(tokens, "", list(range(1, len(tokens) + 1)), probs, origins, "end", [], Stats())
    for width in (7, 12, 100):
        lines = [line.plain for line in steps_view(result, tokenizer, width, 64)]

        def below(label: str, lines=lines) -> str:
            return "".join(line.removeprefix(label)[6 - len(label) :] for line in lines[:-2] if line.startswith(label))

        assert below("how").replace(" ", "") == "".join(ORIGINS[origin][0] for origin in origins)
        assert below("prob").replace(" ", "") == "01234567801"
        assert "<|end|>" in below("text")
        # A digit stands in the column of its token's mark.
        for i, line in enumerate(lines[:-2]):
            if line.startswith("prob"):
                columns, marks = ({n for n, c in enumerate(x[6:]) if c != " "} for x in (line, lines[i - 2]))
                assert columns <= marks


def test_steps_view_gives_digits_to_unsure_tokens_alone():
    tokenizer = _Wrapper()
    sure = Result(tokenizer.encode("abc"), "", [1, 2, 3], [0.9, 0.99, 1.0], ["drafted"] * 3, "length", [], Stats())
    lines = [line.plain for line in steps_view(sure, tokenizer, 80, 4)]
    assert lines == [
        "text  abc",
        "how   ddd",
        "step  123",
        "",
        "how   d revealed ahead on a draft: 3",
        "prob  all 0.9 or more",
    ]
    unsure = dataclasses.replace(sure, probs=[0.899, 0.95, 0.04], origins=["drafted", "bonus", "drafted"])
    lines = [line.plain for line in steps_view(unsure, tokenizer, 80, 4, "temporal")]
    assert lines[3] == "prob  8 0"
    assert lines[-2:] == [
        "how   d drafted and accepted: 2   b bonus from the target: 1",
        "prob  tenths of the target's probability, shown below 0.9: 2",
    ]


def test_steps_view_draws_borders_where_blocks_begin():
    tokenizer = _Wrapper()
    tokens = tokenizer.encode("abcdefg")
    result = Result(tokens, "", [1, 2, 1, 2, 3, 4, 1], [1.0] * 6 + [0.5], ["drafted"] * 7, "length", [7, 7], Stats())
    lines = [line.plain for line in steps_view(result, tokenizer, 80, 4)]
    assert lines[:4] == ["text  ab│cdef│g", "how   dd│dddd│d", "step  12│1234│1", "prob    │    │5"]
    narrow = [line.plain for line in steps_view(result, tokenizer, 6 + 4, 4)]
    assert [line for line in narrow if line.startswith("text")] == ["text  ab│c", "text  def", "text  │g"]


def test_block_text_is_one_line_and_marks_what_is_masked():
    tokenizer = _Wrapper()
    known = tokenizer.encode("a\nb")
    assert block_text(tokenizer, [None, *known, None, None]) == "·a↵b··"
    half = tokenizer.encode("é")[:1]
    assert block_text(tokenizer, half) == "·" and block_text(tokenizer, []) == ""


COMMITS = [
    "",
    "ab",
    "cdefg",
    "",
    "h\n",
    "漢字 ",
    "ij\n\nk",
    "lmnopqrstuvwxyz",
    "",
    "\t",
    "A" * 12,
    "e\u0301é",
    "\n",
    "end",
]


@pytest.mark.parametrize("width", [2, 3, 5, 8, 12, 40])
@pytest.mark.parametrize("height", [2, 3, 24])
def test_streamed_text_erases_exactly_what_is_provisional(monkeypatch, width, height):
    """Whatever the provisional block was, the terminal shows the committed text as if nothing else had been written."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("LINES", str(height))
    tokenizer = _Wrapper()
    blocks = [[None, *tokenizer.encode(" 漢x\ny"), None], [None] * 4, [], [*tokenizer.encode("p" * 23), None]]
    terminal, plain = Terminal(width, height), Terminal(width, height)
    text = StreamedText(tokenizer, terminal, terminal=True)
    seen = set()
    for commit, block in zip(COMMITS * 4, itertools.cycle(blocks[:3] + blocks), strict=False):
        text.push(commit, block)
        plain.write(commit)
        assert terminal.text(dim=False) == plain.text()
        seen.add(terminal.text(dim=True).strip() != "")
    assert seen == {True, False}
    text.end("".join(COMMITS * 4) + "more")
    plain.write("more\n")
    assert terminal.text() == plain.text() and (terminal.row, terminal.column) == (plain.row, plain.column)


def test_statistics_of_nothing_do_not_divide_by_zero():
    assert statistics(Result([], "", [], [], [], "length", [], Stats())) == "0 tokens (length), 0 target forwards"


def test_steps_view_of_nothing_is_empty():
    assert list(steps_view(Result([], "", [], [], [], "length", [], Stats()), _Wrapper(), 80, 4)) == []


class _Wrapper:
    """A tokenizer with the interface of simsd's."""

    def __init__(self) -> None:
        self.backend = byte_pair.byte_tokenizer()

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text)

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
