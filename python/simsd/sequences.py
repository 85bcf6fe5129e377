"""One prompt on its way: what is committed, how it came, and when it ends. Host side only."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence as Seq

from simsd.config import GenerationConfig
from simsd.models.loading import LoadedModel
from simsd.results import Result, Stats


@dataclasses.dataclass(frozen=True)
class Update:
    """News of one sequence.

    Attributes:
        index: of the prompt. tokens: ids newly committed; they never change again.
        provisional: the block on its way behind them, as far as the text may go, None where masked. Under
            `verify="exact"` and "none" what is revealed there stays, too, except that the text may end before it.
        result: the result, once the sequence is done.
    """

    index: int
    tokens: list[int]
    provisional: list[int | None]
    result: Result | None = None


class Sequence:
    """Tokens, step map, probabilities and origins of one prompt, cut at the first end token or the limit."""

    def __init__(self, index: int, prompt: list[int], seed: int, config: GenerationConfig, end_ids: tuple[int, ...]):
        self.index, self.prompt, self.seed = index, prompt, seed
        self.end_ids = end_ids
        self.limit = len(prompt) + config.max_new_tokens
        self.tokens = list(prompt)
        self.steps: list[int] = []
        self.probs: list[float] = []
        self.origins: list[str] = []
        self.provisional: list[int | None] = []
        self.finish_reason: str | None = None if config.max_new_tokens else "length"
        self.reported = False  # its last update is out
        self.stats = Stats()
        self.began: float | None = None

    @property
    def new(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    def commit(self, tokens: Seq[int], steps: Seq[int], probs: Seq[float], origins: Seq[str]) -> list[int]:
        """Appends what was decided; returns the ids that belong to the answer (up to an end token or the limit)."""
        keep = min(len(tokens), self.limit - len(self.tokens))
        end = next((i for i, token in enumerate(tokens[:keep]) if token in self.end_ids), None)
        if end is not None:
            keep = end + 1
        # Tokens come last: an interrupt in between leaves no token without the rest.
        self.steps += steps[:keep]
        self.probs += probs[:keep]
        self.origins += origins[:keep]
        self.tokens += tokens[:keep]
        if end is not None:
            self.finish_reason = "end"
        elif len(self.tokens) >= self.limit:
            self.finish_reason = "length"
        return list(tokens[:keep])

    def stop(self, count: int | None, reason: str) -> None:
        """Ends the text behind its first `count` generated tokens (all, if None)."""
        count = len(self.steps) if count is None else count
        if self.finish_reason is None or count < len(self.steps):
            self.finish_reason = reason
        del self.tokens[len(self.prompt) + count :], self.steps[count:], self.probs[count:], self.origins[count:]

    def touch(self) -> None:
        """Brings the running time up to now."""
        now = time.perf_counter()
        self.began = now if self.began is None else self.began
        self.stats.total_seconds = now - self.began

    def result(self, target: LoadedModel) -> Result:
        new = self.new
        self.stats.new_tokens = len(new)
        return Result(
            tokens=new,
            text=None if target.tokenizer is None else target.tokenizer.decode(new),
            step_map=self.steps[: len(new)],
            probs=self.probs[: len(new)],
            origins=self.origins[: len(new)],
            finish_reason=self.finish_reason or "interrupted",
            prompt_tokens=self.prompt,
            stats=self.stats,
        )
