"""Whether a text repeats itself, as the host has it: where not, nobody need look anything up."""

from __future__ import annotations

from collections.abc import Sequence

TOKENS = 3  # as many that stood in the text before, in this order, are no coincidence


class Repeats:
    """Of one text, which only grows."""

    def __init__(self) -> None:
        self._seen: set[tuple[int, ...]] = set()
        self._count = 0  # tokens of which all that ends among them is in it

    def __call__(self, tokens: Sequence[int], provisional: Sequence[int | None] = ()) -> bool:
        """Whether the last `TOKENS` stood in the text before.

        Args:
            tokens: that are committed.
            provisional: the current block behind them, None where masked; what comes behind a None does not count.
        """
        for end in range(max(self._count, TOKENS), len(tokens)):
            self._seen.add(tuple(tokens[end - TOKENS : end]))
        self._count = max(self._count, len(tokens))
        revealed = list(provisional)
        shown = revealed.index(None) if None in revealed else len(revealed)
        return (*tokens[-TOKENS:], *revealed[:shown])[-TOKENS:] in self._seen
