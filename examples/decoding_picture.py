"""Draws the README's moving picture: one answer of the built-in pair, natively and with exact verification, a target
forward at a time.

python examples/decoding_picture.py [docs/decoding.svg]
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from html import escape

import simsd

QUESTION = "Tom has 23 apples. Tom buys 45 more. How many apples does Tom have now?"
WIDTH, MARGIN, LINE, LETTER, PAD = 760, 16, 30, 8.6, 9
BEAT = 0.45  # seconds that a target forward lasts in the picture
HOLD = 8  # beats that the finished text stays
STYLE = """text { font: 14px monospace; fill: #24292f } .title { font-weight: bold } .cell { fill: #eaeef2 }
.drafted { fill: #ffd8a8 } .target { fill: #c9d1d9 } .kept { fill: #8ce0c4 } .note { fill: #57606a }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .cell { fill: #21262d } .drafted { fill: #8a5a14 }
.target { fill: #484f58 } .kept { fill: #12694f } .note { fill: #8b949e } }"""


@dataclasses.dataclass(frozen=True)
class Lane:
    """One way of decoding: the forward, from 1 on, at which each token was certain, and whether it was drafted."""

    title: str
    words: list[str]
    at: list[int]
    drafted: list[bool]
    forwards: int


def lane(target: simsd.LoadedModel, draft: simsd.LoadedModel, title: str, verify: str) -> Lane:
    """By what a stream tells after each target forward."""
    at: dict[int, int] = {}
    certain = 0
    for number, update in enumerate(simsd.stream(target, QUESTION, draft, verify=verify, drafter="model"), start=1):
        for place in range(certain, certain + len(update.tokens)):
            at.setdefault(place, number)
        certain += len(update.tokens)
        for place, token in enumerate(update.provisional, start=certain):
            if token is not None:
                at.setdefault(place, number)
        result = update.result
    count = len(result.tokens) - (result.finish_reason == "end")
    words = [target.tokenizer.decode([token]) for token in result.tokens[:count]]
    drafted = [origin == "drafted" for origin in result.origins[:count]]
    return Lane(title, words, [at[place] for place in range(count)], drafted, number)


def shown(begin: float, end: float, beats: float) -> str:
    """What lets an element be seen from one beat to another."""
    times = f"0;{begin / beats:.4f};{end / beats:.4f}"
    seconds = f'dur="{beats * BEAT:.2f}s" repeatCount="indefinite" calcMode="discrete"'
    return f'<animate attributeName="opacity" values="0;1;0" keyTimes="{times}" {seconds}/>'


def drawn(one: Lane, top: float, beats: float) -> Iterator[str]:
    """The lane's lines; the last item is where the next one may begin."""
    yield f'<text class="title" x="{MARGIN}" y="{top + 14}">{escape(one.title)}</text>'
    for number in range(1, one.forwards + 1):
        end = number + 1 if number < one.forwards else beats
        told = f"{number} target forward{'s' if number > 1 else ''}"
        yield f'<text class="note" x="{WIDTH - MARGIN}" y="{top + 14}" text-anchor="end" opacity="0">{told}'
        yield f"{shown(number, end, beats)}</text>"
    x, y = MARGIN, top + 24
    for word, at, drafted in zip(one.words, one.at, one.drafted, strict=True):
        word = word.replace("\n", "⏎")
        width = len(word) * LETTER + PAD
        if x + width > WIDTH - MARGIN:
            x, y = MARGIN, y + LINE
        box = f'x="{x:.1f}" y="{y}" width="{width - 3:.1f}" height="{LINE - 6}" rx="4"'
        yield f'<rect class="cell" {box}/>'
        begin = at
        if drafted:
            begin = at - 0.6
            yield f'<rect class="drafted" {box} opacity="0">{shown(begin, at, beats)}</rect>'
        yield f'<rect class="{"kept" if drafted else "target"}" {box} opacity="0">{shown(at, beats, beats)}</rect>'
        label = escape(word).replace(" ", "&#160;")
        yield f'<text x="{x + 3:.1f}" y="{y + 17}" opacity="0">{label}{shown(begin, beats, beats)}</text>'
        x += width
    yield str(y + LINE + 14)


def legend(y: float) -> Iterator[str]:
    x = MARGIN
    for name, told in (("drafted", "drafted"), ("kept", "verified, committed"), ("target", "the target's own")):
        yield f'<rect class="{name}" x="{x}" y="{y}" width="14" height="14" rx="3"/>'
        yield f'<text class="note" x="{x + 20}" y="{y + 12}">{told}</text>'
        x += 40 + LETTER * len(told)


def picture() -> str:
    target, draft = simsd.load("tiny-target"), simsd.load("tiny-draft")
    lanes = [
        lane(target, draft, "native", "none"),
        lane(target, draft, "exact verification of drafts: the same text", "exact"),
    ]
    assert lanes[0].words == lanes[1].words
    beats = max(one.forwards for one in lanes) + HOLD
    body, top = [], 12.0
    for one in lanes:
        *lines, bottom = drawn(one, top, beats)
        body += lines
        top = float(bottom)
    body += legend(top)
    height = top + 26
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *body, "</svg>", ""])


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else "docs/decoding.svg"
    with open(path, "w", encoding="utf-8") as file:
        file.write(picture())
    print(f"wrote {path}")
