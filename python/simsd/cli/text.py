"""How text is shown while it grows, and which text each token adds."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from typing import TextIO

from rich.cells import cell_len

from simsd.text import REPLACEMENT, GrowingText

HIDDEN = "·"  # a masked position, part of a character, a character that cannot be shown
CONTROLS = {"\n": "↵", "\r": "␍", "\t": "→"}
DIM, PLAIN, ERASE_BELOW = "\x1b[2m", "\x1b[0m", "\x1b[J"
TAB = 8


class StreamedText:
    """Writes committed text to `out` as it comes; on a terminal also the provisional block behind it.

    Committed text is written once and stays. The block on its way is dim, in symbols of one line, and is erased before
    anything else is written.
    """

    def __init__(self, tokenizer, out: TextIO, terminal: bool) -> None:
        self._tokenizer = tokenizer
        self._out, self._terminal = out, terminal
        self._text = ""  # committed
        self._column = 0  # where the committed text ends; the terminal's width where it fills its line
        self._erase = ""  # from behind the provisional block

    def push(self, new: str, provisional: Sequence[int | None] = ()) -> None:
        """Newly committed text, and the ids of the block behind it, None where masked."""
        self._text += new
        written, self._erase = self._erase + new, ""
        if self._terminal:
            width, height = shutil.get_terminal_size()
            self._column = advance(new, self._column, width)[1]
            written += self._provisional(provisional, width, height)
        self._write(written)

    def end(self, text: str) -> None:
        """Ends with the whole text, of which some may not have been pushed: an interrupt came between."""
        self._write(self._erase + (text[len(self._text) :] if text.startswith(self._text) else "") + "\n")
        self._erase = ""

    def _provisional(self, provisional: Sequence[int | None], width: int, height: int) -> str:
        """The block and, in `_erase`, the way back; nothing while the cursor hangs at the end of a full line, since no
        movement leads back there."""
        shown = block_text(self._tokenizer, provisional)
        while shown and advance(shown, self._column, width)[0] > height - 2:
            shown = shown[:-1]  # what has left the screen cannot be erased
        if not shown or self._column >= width:
            return ""
        rows = advance(shown, self._column, width)[0]
        up, right = f"\x1b[{rows}A" if rows else "", f"\x1b[{self._column}C" if self._column else ""
        self._erase = f"\r{up}{right}{ERASE_BELOW}"
        return f"{DIM}{shown}{PLAIN}"

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def advance(text: str, column: int, width: int) -> tuple[int, int]:
    """Rows that a terminal's cursor goes down while `text` is written from `column`, and its column then.

    A full line leaves the cursor at `width`: terminals wrap when the next character comes.
    """
    rows = 0
    for character in text:
        cells = cell_len(character)
        if character == "\n":
            rows, column = rows + 1, 0
        elif character == "\r":
            column = 0
        elif character == "\t":
            column = min(column // TAB * TAB + TAB, width - 1)
        elif column + cells > width:
            rows, column = rows + 1, cells
        else:
            column += cells
    return rows, column


def before_end(block: Sequence[int | None], end_ids: Sequence[int]) -> Sequence[int | None]:
    """A block on its way as far as there is text: to its first end token."""
    return block[: next((i for i, token in enumerate(block) if token in end_ids), len(block))]


def block_text(tokenizer, tokens: Sequence[int | None]) -> str:
    """A block on its way in one line: `HIDDEN` for every masked position, symbols for control characters."""
    text = ""
    for masked, run in itertools.groupby(tokens, lambda token: token is None):
        ids = list(run)
        text += HIDDEN * len(ids) if masked else "".join(map(visible, tokenizer.decode(ids)))
    return text.replace(REPLACEMENT, HIDDEN)


def visible(character: str) -> str:
    return CONTROLS.get(character, character if character.isprintable() else HIDDEN)


def pieces(tokenizer, tokens: Sequence[int]) -> list[str]:
    """The text that each token adds; a character of several tokens belongs to its last one."""
    text = GrowingText(tokenizer)
    parts = [text.push([token]) for token in tokens]
    if parts:
        parts[-1] += text.rest()
    return parts
