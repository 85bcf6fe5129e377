"""What `plan_block` knows of one slot, as lists, and what is proposed in a state of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from simsd_kernels.reveal.arguments import STRATEGIES
from simsd_kernels.sample_logits.reference import sample_logits

CERTAIN = 1e30  # a sharpness that leaves one order
OPTIONAL = ("seen_rows", "order_shift", "order_pair")  # of states seen


@dataclass
class State:
    """A partial reveal of block number `block` (0: the current one) at denoising step `step`."""

    block: int
    revealed: int
    tokens: tuple[int, ...]  # -1 where masked
    step: int
    reach: float  # the draft's estimate that the target's walk visits it
    cost: int = 1  # in blocks of rows: 2 where the finished block before it has to come along
    score: float = field(default=0.0)

    def masked(self) -> list[int]:
        return [i for i in range(len(self.tokens)) if not self.revealed >> i & 1]


@dataclass
class Rule:
    """How a slot is denoised."""

    counts: list[int]  # positions to reveal at each step
    strategy: str
    threshold: float
    sub_blocks: int = 0  # set of positions at which one begins

    def open(self, masked: list[int]) -> list[int]:
        """Of masked positions those that a step before the last one may reveal."""
        later = (i for i in range(masked[0] + 1, masked[-1] + 1) if self.sub_blocks >> i & 1)
        end = next(later, masked[-1] + 1)
        return [i for i in masked if i < end]


@dataclass
class Seen:
    """What the target drew in a state that it has seen, [L] each; `pair` [L, L]. exact: whether it still would."""

    block: int
    exact: bool
    revealed: int
    tokens: list[int]
    prob: list[float]
    log_odds: list[float]
    entropy: list[float]
    rows: list[int] | None  # of logits, where each state has draws of its own
    shift: list[float] | None
    pair: list[list[float]] | None

    @property
    def known(self) -> list[int]:
        return [i for i in range(len(self.tokens)) if self.revealed >> i & 1]

    def leads_to(self, state: State) -> bool:
        same = (state.revealed >> i & 1 and state.tokens[i] == self.tokens[i] for i in self.known)
        return self.block == state.block and all(same)

    def proposal(
        self, state: State, token: list, prob: list, log_odds: list, entropy: list
    ) -> tuple[list, list, list, list]:
        """Of what is drawn from the logits of this state: what that makes where more is revealed."""
        more = [i for i in range(len(self.tokens)) if (state.revealed & ~self.revealed) >> i & 1]
        if self.shift is None or not more:
            return token, prob, log_odds, entropy
        changed = []
        for before, change, of_pair in zip(log_odds, self.shift, self.pair, strict=True):
            for j in more:
                change += of_pair[j]
            changed.append(_float32(before + change))
        return token, [_float32(_probability(x)) for x in changed], changed, entropy


@dataclass
class Slot:
    """One slot's arguments. Blocks are counted from the current one."""

    root: State
    start: int
    rule: Rule
    depth: int  # blocks that the draft has a proposal for
    blocks_left: int  # that the walk may enter
    calibration: float
    min_visit_prob: float
    draft_tokens: list[list[int]]  # [K, L], and so on
    statistics: tuple[list[list[float]], ...]  # prob, log_odds, entropy
    sharpness: list[float]
    logits: Tensor | None  # [K, L, V]
    sampling: dict[str, Tensor | None]
    seen: list[Seen]
    seen_sharpness: float
    seen_logits: Tensor | None  # [N, V]
    peeks: bool

    def proposal(self, state: State) -> tuple[list, list, list, list, float, float] | None:
        """token, prob, log_odds and entropy of each position, as they would be drawn in `state`, how far they are
        believed to tell the order, and how far the probabilities are (None: they are certain); None: nothing is
        proposed."""
        nearest = max((s for s in self.seen if s.leads_to(state)), key=lambda s: len(s.known), default=None)
        if nearest is not None:
            certain = nearest.exact and len(nearest.known) == state.revealed.bit_count()
            belief = (CERTAIN, None) if certain else (self.seen_sharpness, self.calibration)
            drawn = nearest.tokens, nearest.prob, nearest.log_odds, nearest.entropy
            if self.draws_apart:
                drawn = self.drawn(state, self.seen_logits[torch.tensor(nearest.rows).clamp(min=0)])
            return *nearest.proposal(state, *drawn), *belief
        if state.block >= self.depth:
            return None
        sharpness = self.sharpness[state.block], self.calibration
        if self.logits is None:
            return *(of_blocks[state.block] for of_blocks in (self.draft_tokens, *self.statistics)), *sharpness
        return *self.drawn(state, self.logits[state.block]), *sharpness

    @property
    def draws_apart(self) -> bool:
        """Whether each state has draws of its own."""
        noisy = self.logits is not None and self.sampling["seed"] is not None and self.sampling["temperature"] > 0
        return noisy and self.rule.strategy != "sequential"

    def drawn(self, state: State, logits: Tensor) -> tuple[list, list, list, list]:
        """token, prob, log_odds and entropy as drawn in `state` from logits [L, V]."""
        length = len(state.tokens)
        first = self.start + state.block * length
        key = 0 if self.rule.strategy == "sequential" else signed(state.revealed)

        def every(name: str, default: float, dtype: torch.dtype) -> Tensor:
            value = self.sampling[name]
            value = torch.tensor(default, dtype=dtype, device=logits.device) if value is None else value
            return value.expand(length)

        out = sample_logits(
            logits,
            every("temperature", 0.0, torch.float32),
            every("top_k", 0, torch.int32),
            every("top_p", 1.0, torch.float32),
            every("seed", 0, torch.int64),
            torch.arange(first, first + length, dtype=torch.int32, device=logits.device),
            torch.full((length,), key, dtype=torch.int64, device=logits.device),
            self.sampling["banned"],
        )
        return tuple(x.tolist() for x in out[:4])


def slot_of(given: dict, b: int) -> Slot:
    _, ahead, length = given["draft_tokens"].shape

    def of_slot(name: str):
        return given[name][b].tolist()

    start, revealed = of_slot("start"), of_slot("revealed") & ((1 << length) - 1)
    known = given["text"][b, start : start + length].tolist()
    tokens = tuple(token if revealed >> i & 1 else -1 for i, token in enumerate(known))
    strategy = STRATEGIES[of_slot("strategy")]
    sub_blocks = 0 if given["sub_blocks"] is None else of_slot("sub_blocks")
    of_slots = ("temperature", "top_k", "top_p", "seed")
    return Slot(
        root=State(0, revealed, tokens, of_slot("step"), reach=1.0),
        start=start,
        rule=Rule(of_slot("schedule")[: of_slot("steps")], strategy, of_slot("threshold"), sub_blocks),
        depth=min(of_slot("proposal_depth"), ahead),
        blocks_left=min((of_slot("end") - start) // length, of_slot("draft_end")),
        calibration=of_slot("draft_calibration"),
        min_visit_prob=of_slot("min_visit_prob"),
        draft_tokens=of_slot("draft_tokens"),
        statistics=(of_slot("prob"), of_slot("log_odds"), of_slot("entropy")),
        sharpness=of_slot("order_sharpness"),
        logits=None if given["draft_logits"] is None else given["draft_logits"][b],
        sampling={name: None if given[name] is None else given[name][b] for name in of_slots}
        | {"banned": given["banned"]},
        seen=_seen(given, b, (1 << length) - 1),
        seen_sharpness=0.0 if given["seen_sharpness"] is None else of_slot("seen_sharpness"),
        seen_logits=given["seen_logits"],
        peeks=given["peeks"] is not None and of_slot("peeks") != 0,
    )


def _seen(given: dict, b: int, full: int) -> list[Seen]:
    if given["seen_revealed"] is None:
        return []
    names = "block", "exact", "revealed", "tokens", "prob", "log_odds", "entropy"
    fields = [given[f"seen_{name}"][b].tolist() for name in names]
    fields += [[None] * len(fields[0]) if given[n] is None else given[n][b].tolist() for n in OPTIONAL]
    states = [Seen(*state) for state in zip(*fields, strict=True)]
    return [state for state in states if state.revealed & full != full]


def _probability(log_odds: float) -> float:
    """Its inverse. Log-odds that are no number make a probability that is none."""
    return 1.0 / (1.0 + math.exp(min(-log_odds, 700.0)))


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def signed(bits: int) -> int:
    """A 64-bit set as the int64 that stores it."""
    return bits - (1 << 64) if bits >= 1 << 63 else bits
