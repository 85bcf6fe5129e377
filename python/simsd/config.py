"""What to generate and how: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from simsd.errors import SimsdError

STRATEGIES = ("sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded")
VERIFIERS = ("exact", "temporal", "none")
DRAFTERS = ("auto", "model", "self")
RULES = ("match", "mrs")
REJECTED_TAILS = ("truncate", "truncate_no_bonus", "target_argmax", "target_argmax_all", "draft_argmax")
MAX_BLOCK_LENGTH = 64  # a revealed set is one int64 bitmask
MAX_LOOKAHEAD = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Settings of one generation; a bad value raises `SimsdError` with the allowed ones.

    Attributes:
        max_new_tokens: tokens to return at most; whole blocks are decoded and the last one is cut.
        block_length: tokens per block, None for the target's own.
        steps: denoising steps T per block, 1 <= T <= block length; None for one token per step.
        strategy: which masked positions a step reveals (SDAR's four rules).
        threshold: probability above which `low_confidence_dynamic` reveals a position.
        entropy_bound: nats that one step of `entropy_bounded` may spend.
        temperature: 0 is greedy; statistics and confidences are then taken at temperature 1.
        top_k: ids kept before drawing (ties with the k-th stay), 0 for all.
        top_p: probability mass kept before drawing, 1.0 for all.
        seed: of the counter-based noise; an int for every prompt, or one int per prompt.
        verify: how a draft is checked: "exact" (the text is native decoding's, token for token), "temporal" (SimSD as
            published, an approximation) or "none" (plain native decoding).
        drafter: who drafts for "exact": "model" (the draft model), "self" (the target's own logits for the state
            before) or "auto" (whichever pays, block by block, or neither; "self" where there is no draft model). Never
            changes the text.
        lookahead: blocks that one exact verification may go through, the current one included; "auto" takes fewer where
            that pays.
        max_rows: rows that one exact verification may add for drafted states, over the whole batch (rows of current
            states and of commits come on top); None for what the measured time of a row is worth.
        order_power: how far the draft's confidence is believed to tell the order in which the target reveals: a
            position that it ranks x lower in log-odds is exp(-order_power * x) times as likely to be next. Large values
            leave a chain of states, 0 takes every order for equally likely. None: 0.25 for the draft model, 1 for the
            target's own logits.
        accept: "match" (the target's own token, greedy or with shared noise) or "mrs" (modified rejection sampling,
            "temporal" only).
        rejected_tail: what becomes of a drafted block after its first rejected position, "temporal" only:
            "truncate" keeps accepted + bonus, "truncate_no_bonus" drops the bonus unless it is the only token,
            "target_argmax" fills the rest with the target's tokens, "target_argmax_all" also replaces the accepted
            ones, "draft_argmax" keeps the draft's tokens after the bonus.
        draft_steps: denoising steps, a forward each, that the draft takes per block. None: 1 for "exact", whose draft
            proposes what is left from the last of them; all for "temporal", where positions that the draft never
            reveals take the target's token and do not count as drafted.
        end_gate: least target probability with which an end token may arrive as bonus (0 disables), "temporal" only.
        end_token_ids: ids that end the text, None for the target's own; () never ends.
    """

    max_new_tokens: int = 256
    block_length: int | None = None
    steps: int | None = None
    strategy: str = "low_confidence_static"
    threshold: float = 0.85
    entropy_bound: float = 0.5
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | Sequence[int] = 0
    verify: str = "exact"
    drafter: str = "auto"
    lookahead: int = 2
    max_rows: int | None = None
    order_power: float | None = None
    accept: str = "match"
    rejected_tail: str = "truncate"
    draft_steps: int | None = None
    end_gate: float = 0.0
    end_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        _one_of("strategy", self.strategy, STRATEGIES)
        _one_of("verify", self.verify, VERIFIERS)
        _one_of("drafter", self.drafter, DRAFTERS)
        _integer("lookahead", self.lookahead, 1, MAX_LOOKAHEAD)
        if self.max_rows is not None:
            _integer("max_rows", self.max_rows, 0)
        _one_of("accept", self.accept, RULES)
        _one_of("rejected_tail", self.rejected_tail, REJECTED_TAILS)
        _integer("max_new_tokens", self.max_new_tokens, 0)
        if self.block_length is not None:
            _integer("block_length", self.block_length, 1, MAX_BLOCK_LENGTH)
        for name in ("steps", "draft_steps"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 1, self.block_length or MAX_BLOCK_LENGTH)
        _integer("top_k", self.top_k, 0)
        if self.order_power is not None:
            _number("order_power", self.order_power, 0.0, math.inf)
        _number("temperature", self.temperature, 0.0, math.inf)
        _number("entropy_bound", self.entropy_bound, 0.0, math.inf)
        for name in ("threshold", "end_gate"):
            _number(name, getattr(self, name), 0.0, 1.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise SimsdError("top_p must be above 0 (1.0 keeps every token), got 0.0")
        self._refuse_temporal_settings()
        seeds = (self.seed,) if isinstance(self.seed, int) else tuple(self.seed)
        for seed in seeds:
            _integer("seed", seed, -(2**63), 2**63 - 1)
        for token in self.end_token_ids or ():
            _integer("end_token_ids", token, 0)

    def _refuse_temporal_settings(self) -> None:
        """An exact verifier that took them silently would not do what was asked."""
        if self.verify != "exact":
            return
        for name, value, neutral in (
            ("accept", self.accept, "match"),
            ("rejected_tail", self.rejected_tail, "truncate"),
            ("end_gate", self.end_gate, 0.0),
        ):
            if value != neutral:
                raise SimsdError(f"{name}={value!r} is a setting of verify='temporal'; got verify='exact'")

    def block_steps(self, block_length: int) -> int:
        """Denoising steps T for a block of `block_length`; raises where more were asked for than a block has."""
        for name in ("steps", "draft_steps"):
            value = getattr(self, name)
            if value is not None and value > block_length:
                raise SimsdError(f"{name} must be at most the block length {block_length}, got {value}")
        return self.steps or block_length

    def reveal_counts(self, block_length: int) -> list[int]:
        """n[s] for s in 0..T-1: L // T positions per denoising step, the remainder to the early steps."""
        base, extra = divmod(block_length, self.block_steps(block_length))
        return [base + (step < extra) for step in range(self.block_steps(block_length))]

    def seeds(self, count: int) -> list[int]:
        """One seed per prompt."""
        if isinstance(self.seed, int):
            return [self.seed] * count
        if len(self.seed) != count:
            raise SimsdError(f"seed must be one int or one per prompt: got {len(self.seed)} seeds for {count} prompts")
        return list(self.seed)


def _one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise SimsdError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _integer(name: str, value: object, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        allowed = f"an integer >= {low}" if high is None else f"an integer in {low}..{high}"
        raise SimsdError(f"{name} must be {allowed}, got {value!r}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or math.isinf(value):
        allowed = f"a finite number >= {low:g}" if math.isinf(high) else f"a number in {low:g}..{high:g}"
        raise SimsdError(f"{name} must be {allowed}, got {value!r}")
