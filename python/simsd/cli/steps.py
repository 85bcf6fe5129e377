"""How each token of a result came, drawn in the terminal; and the line of statistics."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.text import Text

from simsd.cli.text import HIDDEN, pieces, visible
from simsd.text import REPLACEMENT

if TYPE_CHECKING:
    from simsd.results import Result, Stats

# origin -> its mark under the text, its style, its line in the legend
ORIGINS = {
    "denoised": (".", "cyan", "denoised by the target"),
    "drafted": ("d", "green", "drafted and accepted"),
    "bonus": ("b", "bold yellow", "bonus from the target"),
    "undrafted": ("u", "magenta", "never drafted, the target's"),
    "tail": ("t", "red", "put after a rejection"),
}
AHEAD = "revealed ahead on a draft"  # what "drafted" means where every action is the target's own
GUTTER = 6
BORDER = "│"
SURE = 0.9  # probabilities from here on are not worth a digit


@dataclasses.dataclass(frozen=True)
class Cell:
    text: str
    origin: str
    step: int
    prob: float
    ends_row: bool
    border: str  # before it, where it is the first token of a block

    @property
    def width(self) -> int:
        return cell_len(self.text)


def steps_view(result: Result, tokenizer, width: int, block_length: int, verify: str = "exact") -> Iterator[Text]:
    """Lines of text with borders between blocks, each with lines below: how a token came, at which denoising step, and,
    where the target was not sure, the tenths of its probability; then the legend."""
    for row in _rows(_cells(result, tokenizer, block_length), width - GUTTER):
        text, how, step, prob = (Text(label.ljust(GUTTER), style="dim") for label in ("text", "how", "step", "prob"))
        for cell in row:
            mark, style, _ = ORIGINS[cell.origin]
            for line in (text, how, step, prob):
                line.append(cell.border, style="dim")
            text.append(cell.text, style=f"not dim {style}")
            how.append(mark.ljust(cell.width), style=f"not dim {style}")
            number = str(cell.step) if len(str(cell.step)) <= cell.width else "+"
            step.append(number.ljust(cell.width))
            tenths = "" if cell.prob >= SURE else str(int(10 * cell.prob))
            prob.append(tenths.ljust(cell.width), style="not dim red" if cell.prob < 0.5 else "not dim yellow")
        yield from (text, how, step)
        if any(cell.prob < SURE for cell in row):
            yield prob
        yield Text()
    if result.tokens:
        yield from _legend(result, verify)


def _legend(result: Result, verify: str) -> Iterator[Text]:
    counts = Counter(result.origins)
    how = Text("how".ljust(GUTTER), style="dim")
    for origin, (mark, style, meaning) in ORIGINS.items():
        if counts[origin]:
            meaning = AHEAD if origin == "drafted" and verify == "exact" else meaning
            how.append(f"{mark} {meaning}: {counts[origin]}   ", style=f"not dim {style}")
    how.rstrip()
    yield how
    unsure = sum(prob < SURE for prob in result.probs)
    shown = f"tenths of the target's probability, shown below {SURE}: {unsure}" if unsure else f"all {SURE} or more"
    yield Text("prob".ljust(GUTTER) + shown, style="dim")


def _cells(result: Result, tokenizer, block_length: int) -> list[Cell]:
    cells = []
    columns = (result.tokens, pieces(tokenizer, result.tokens), result.origins, result.step_map, result.probs)
    for position, (token, piece, origin, step, prob) in enumerate(
        zip(*columns, strict=True), start=len(result.prompt_tokens)
    ):
        border = BORDER if cells and position % block_length == 0 else ""
        shown = "".join(map(visible, piece)) or _special(tokenizer, token)
        cells.append(Cell(shown, origin, step, prob, piece.endswith("\n"), border))
    return cells


def _special(tokenizer, token: int) -> str:
    """What stands for a token without text of its own: a special token's name, a dot for part of a character."""
    name = tokenizer.decode([token], skip_special_tokens=False)
    return name if name.strip() and name.isprintable() and REPLACEMENT not in name else HIDDEN


def _rows(cells: list[Cell], width: int) -> Iterator[list[Cell]]:
    row: list[Cell] = []
    used = 0
    for cell in cells:
        if row and used + len(cell.border) + cell.width > width:
            yield row
            row, used = [], 0
        row.append(cell)
        used += len(cell.border) + cell.width
        if cell.ends_row:
            yield row
            row, used = [], 0
    if row:
        yield row


def statistics(result: Result) -> str:
    """Tokens, target forwards, acceptance and speed in one line."""
    return counts(result.stats, f"{result.stats.new_tokens} tokens ({result.finish_reason})")


def counts(stats: Stats, tokens: str) -> str:
    """The same of any stats; `tokens`: how many, and what else there is to say of them."""
    forwards = f"{stats.target_forwards} target forward{'' if stats.target_forwards == 1 else 's'}"
    if stats.target_forwards:
        forwards += f" ({stats.new_tokens / stats.target_forwards:.1f} tokens each)"
    parts = [tokens, forwards]
    if stats.draft_forwards:
        parts.append(f"{stats.draft_forwards} of the draft")
    if stats.acceptance is not None:
        parts.append(f"{stats.accepted}/{stats.drafted} drafted accepted ({stats.acceptance:.0%})")
    if stats.bonus:
        parts.append(f"{stats.bonus} bonus")
    if stats.tokens_per_second:
        parts.append(f"{stats.tokens_per_second:.0f} tok/s")
    return ", ".join(parts)
