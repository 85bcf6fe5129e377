"""Text of tokens that arrive bit by bit, and how it is shown while it does."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from typing import TextIO

from rich.cells import cell_len

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what decoders give for the bytes of an unfinished character
HIDDEN = "·"  # a masked position, part of a character, a character that cannot be shown
CONTROLS = {"\n": "↵", "\r": "␍", "\t": "→"}
DIM, PLAIN, ERASE_BELOW = "\x1b[2m", "\x1b[0m", "\x1b[J"
TAB = 8


class GrowingText:
    """Decodes a growing list of tokens; every `push` returns the text that it added.

    The last characters are held back while their bytes are incomplete, and all new text while the tokenizer still
    rewrites what is already out. `rest()` ends it: all returned pieces together are the text of all tokens.
    """

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tokens: list[int] = []
        self._out = ""

    def push(self, tokens: Sequence[int]) -> str:
        self.tokens += tokens
        return self._take(self.tokenizer.decode(self.tokens).rstrip(REPLACEMENT))

    def rest(self) -> str:
        return self._take(self.tokenizer.decode(self.tokens))

    def _take(self, text: str) -> str:
        if not text.startswith(self._out):
            return ""
        new = text[len(self._out) :]
        self._out = text
        return new


class StreamedText:
    """Writes committed text to `out` as it comes; on a terminal also the provisional block behind it.

    Committed text is written once and stays. The block on its way is dim, in symbols of one line, and is erased before
    anything else is written.
    """

    def __init__(self, tokenizer, out: TextIO, terminal: bool) -> None:
        self._text = GrowingText(tokenizer)
        self._out, self._terminal = out, terminal
        self._column = 0  # where the committed text ends; the terminal's width where it fills its line
        self._erase = ""  # from behind the provisional block

    @property
    def tokens(self) -> list[int]:
        return self._text.tokens

    def push(self, tokens: Sequence[int], provisional: Sequence[int | None] = ()) -> None:
        """Newly committed ids, and the block behind them, None where masked."""
        new = self._text.push(tokens)
        written, self._erase = self._erase + new, ""
        if self._terminal:
            width, height = shutil.get_terminal_size()
            self._column = advance(new, self._column, width)[1]
            written += self._provisional(provisional, width, height)
        self._write(written)

    def end(self, tokens: Sequence[int]) -> None:
        """Ends the text with all of its ids, of which some may not have been pushed: an interrupt came between."""
        self._write(self._erase + self._text.push(tokens[len(self.tokens) :]) + self._text.rest() + "\n")
        self._erase = ""

    def _provisional(self, provisional: Sequence[int | None], width: int, height: int) -> str:
        """The block and, in `_erase`, the way back; nothing while the cursor hangs at the end of a full line, since no
        movement leads back there."""
        shown = block_text(self._text.tokenizer, provisional)
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
