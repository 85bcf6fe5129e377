"""Tokens per target forward along a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from simsd.results import Result


@dataclasses.dataclass(frozen=True)
class Span:
    """Some positions of all texts. `forwards`: the target forwards that began there."""

    first: int
    tokens: int
    forwards: int

    @property
    def tokens_per_forward(self) -> float | None:
        return self.tokens / self.forwards if self.forwards else None


def spans(results: Sequence[Result], block_length: int, width: int = 8) -> list[Span]:
    """The texts of native or exact decoding in spans of `width` positions, from their first token on.

    A denoising step with a token that came as "denoised" is a forward of its own; what came as "drafted" rode on one
    before, which may have begun in the span before. Forwards that only computed a prompt, or what was decided behind
    the text's end, are none of these.
    """
    tokens: dict[int, int] = {}
    forwards: dict[int, set[tuple[int, int, int]]] = {}
    for text, result in enumerate(results):
        prompt = len(result.prompt_tokens)
        for at, (step, origin) in enumerate(zip(result.step_map, result.origins, strict=True)):
            span = at // width
            tokens[span] = tokens.get(span, 0) + 1
            if origin == "denoised":
                forwards.setdefault(span, set()).add((text, (prompt + at) // block_length, step))
    return [Span(span * width, count, len(forwards.get(span, ()))) for span, count in sorted(tokens.items())]
