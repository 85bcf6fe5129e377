"""A terminal that keeps what it shows: enough of one to see what a program's output looks like."""

from __future__ import annotations

import io
import re

from rich.cells import cell_len

TOKEN = re.compile(r"\x1b\[(\d*)([A-Za-z])|(.)", re.DOTALL)


class Terminal(io.StringIO):
    """Rows of (character, dim); what has scrolled off the screen stays in `rows`, out of the cursor's reach."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self.width, self.height = width, height
        self.rows: list[list[tuple[str, bool]]] = [[]]
        self.row = self.column = 0  # a full line leaves the column at `width`
        self.dim = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        for number, command, character in TOKEN.findall(text):
            if command:
                self._command(command, int(number or 0))
            else:
                self._character(character)
        return len(text)

    def text(self, dim: bool | None = None) -> str:
        """All rows; with `dim` only what is shown so, or only what is not."""
        kept = ("".join(c for c, is_dim in row if dim in (None, is_dim)).rstrip() for row in self.rows)
        return "\n".join(kept).rstrip("\n")

    def _command(self, command: str, number: int) -> None:
        if command == "A":
            self.row = max(self.row - number, len(self.rows) - self.height, 0)
        elif command == "C":
            self.column = min(self.column + number, self.width - 1)
        elif command == "J" and number == 0:
            del self.rows[self.row + 1 :], self.rows[self.row][self.column :]
        elif command == "m" and number in (0, 2):
            self.dim = number == 2
        else:
            raise AssertionError(f"the terminal does not know CSI {number}{command}")

    def _character(self, character: str) -> None:
        if character == "\n":
            self._down()
        elif character == "\r":
            self.column = 0
        elif character == "\t":
            self.column = min(self.column // 8 * 8 + 8, self.width - 1)
        else:
            cells = cell_len(character)
            if self.column + cells > self.width:
                self._down()
            line = self.rows[self.row]
            line += [(" ", False)] * (self.column - len(line))
            line[self.column : self.column + cells] = [(character, self.dim)] + [("", self.dim)] * (cells - 1)
            self.column += cells

    def _down(self) -> None:
        self.row, self.column = self.row + 1, 0
        if self.row == len(self.rows):
            self.rows.append([])
