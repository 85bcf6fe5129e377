"""Draws the guide's picture: `simsd chat` with the built-in pair, in the middle of its second answer.

python examples/chat_picture.py [docs/chat.svg]
"""

from __future__ import annotations

import io
import re
import sys

from rich.console import Console
from rich.text import Text

import simsd
from simsd.cli.chat import PROMPT
from simsd.cli.text import before_end, block_text

QUESTIONS = ["Kim has 12 pens. Kim buys 5 more. How many pens are there at the end?", "What is the capital of France?"]
WIDTH = 76


def answer(engine: simsd.Engine, question: str, iterations: int | None = None) -> Text:
    """An answer, or what a terminal shows of it after so many iterations."""
    engine.add(question, verify="none")
    text, tokenizer = Text(), engine.target.tokenizer
    for number, update in enumerate(engine.stream(), start=1):
        text.append(update.text)
        if number == iterations:
            block = before_end(update.provisional, engine.target.end_token_ids)
            return text.append(block_text(tokenizer, block), style="dim")
    return text


def picture() -> str:
    """An SVG. By native decoding: it takes one step at a time, whatever the clock says."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    engine = simsd.Engine("tiny-target", max_batch=1)
    for question, iterations in zip(QUESTIONS, (None, 5), strict=True):
        console.print(Text(PROMPT + question))
        console.print(answer(engine, question, iterations))
    drawn = console.export_svg(title="simsd chat", unique_id="chat")
    return re.sub(r"@font-face {[^}]*}\s*", "", drawn)  # a picture that loads nothing: any monospaced font will do


if __name__ == "__main__":
    path = sys.argv[1] if len(sys.argv) > 1 else "docs/chat.svg"
    with open(path, "w", encoding="utf-8") as file:
        file.write(picture())
    print(f"wrote {path}")
