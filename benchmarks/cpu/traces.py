"""Native decoding, state by state, and how many target forwards a plan of drafted states saves along it.

Exact verification leaves the target on native decoding's path. So what a way of choosing states brings follows from
that path, without running it: the walk goes on while native's next state is among those chosen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import simsd_kernels as kernels
from simsd.decode.iteration import Shape
from simsd.decode.slots import Slots

MASKED = -1
ALTERNATIVES = 2  # tokens that are kept of each position, the likeliest
State = tuple[int, ...]  # the tokens of a block, MASKED where it is masked


def masked(state: State) -> list[int]:
    return [i for i, token in enumerate(state) if token == MASKED]


def put(state: State, at: int, token: int) -> State:
    return (*state[:at], token, *state[at + 1 :])


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Per position [L], of meaning where the state is masked: the token that is drawn, its probability and log-odds."""

    token: list[int]
    prob: list[float]
    log_odds: list[float]


@dataclasses.dataclass(frozen=True, eq=False)
class Seen:
    """What the target's forward on a state told of it.

    Attributes:
        drawn: as drawn there. likeliest: [L, ALTERNATIVES] tokens; greedy only.
        draw_in: what the same logits give in a state of that revealed set, with its noise.
    """

    drawn: Drawn
    likeliest: list[list[int]]
    draw_in: Callable[[int], Drawn]

    def draw(self, state: State) -> Drawn:
        """What these logits would have drawn in another state, where its positions are masked in both."""
        return self.draw_in(sum(1 << i for i, token in enumerate(state) if token != MASKED))


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A block as native decoding fills it.

    Attributes:
        path: the states, one token more each, the last one finished. seen: of each but that.
        prompt: positions that the prompt filled. stop_ids: tokens that end the text.
        last: whether the text's limit leaves no block behind it.
    """

    path: list[State]
    seen: list[Seen]
    prompt: int
    stop_ids: frozenset[int]
    last: bool

    def leads_on(self, finished: State) -> bool:
        """Whether a block would follow one that is finished so."""
        return not self.last and self.stop_ids.isdisjoint(finished[self.prompt :])


class Recorder:
    """Keeps what one slot's native decoding, one token per step, sees. `texts`: blocks of each request, in turn."""

    def __init__(self) -> None:
        self.texts: list[list[Block]] = []
        self._at: tuple[int, int] = (-1, -1)

    def watch(self, logits: Tensor, plan: kernels.Plan, slots: Slots, shape: Shape) -> None:
        """Called with the logits of every target forward."""
        rows = plan.state_rows[0, 0]
        if not (rows >= 0).any():  # a chunk of the prompt
            return
        epoch, start, length = int(slots.request_epoch[0]), int(slots.start[0]), slots.length
        state = tuple(torch.where(rows >= 0, MASKED, slots.text[0, start : start + length]).tolist())
        seen = _seen(logits, rows, plan.state_revealed[0, :1], slots, shape)
        if self._at[0] != epoch:
            self.texts.append([])
        if self._at != (epoch, start):
            prompt = max(int(slots.prompt_len[0]) - start, 0)
            stop_ids = frozenset(slots.stop_ids[0].tolist()) - {-1}
            self.texts[-1].append(Block([state], [], prompt, stop_ids, start + 2 * length > int(slots.end[0])))
        self._at = epoch, start
        block = self.texts[-1][-1]
        if block.path[-1] != state:
            raise ValueError("only one token per step, the most confident first, can be recorded")
        block.seen.append(seen)
        at = max(masked(state), key=lambda i: seen.drawn.log_odds[i])  # the first of equals
        block.path.append(put(state, at, seen.drawn.token[at]))


def _seen(logits: Tensor, rows: Tensor, revealed: Tensor, slots: Slots, shape: Shape) -> Seen:
    """rows: int32 [L], of the masked positions, -1 elsewhere; revealed: int64 [1], of the state that they are of."""
    length, at = len(rows), (rows >= 0).nonzero().squeeze(1)
    logits, position = logits[rows[at].long()], slots.span(slots.start)[0, at]  # copies
    settings = [x[:1].clone().expand(len(at)) for x in (slots.temperature, slots.top_k, slots.top_p, slots.seed)]
    banned = slots.banned(shape.allowed_ids)

    def sample(logits: Tensor, key: Tensor) -> Drawn:
        out = kernels.sample_logits(logits, *settings, position, key.expand(len(at)), banned)
        return Drawn(*(x.new_zeros(length).scatter(0, at, x).tolist() for x in out[:3]))

    drawn = sample(logits, revealed)
    if slots.temperature[0] > 0:
        return Seen(drawn, [], lambda key: sample(logits, torch.tensor([key])))
    likeliest = [drawn.token]
    while len(likeliest) < ALTERNATIVES:
        logits.scatter_(1, torch.tensor(likeliest[-1])[at, None], -torch.inf)
        likeliest.append(sample(logits, revealed).token)
    return Seen(drawn, list(map(list, zip(*likeliest, strict=True))), lambda _: drawn)


# The states to take, of at most so many blocks of rows: of the block, from the current state, by what was seen of the
# state before. A finished one stands for the fresh state of the next block, and costs two.
Planner = Callable[[Block, Seen, State, int], list[State]]


def cost(state: State) -> int:
    """Blocks of rows that a drafted state takes, as `plan_block` counts: a finished block comes along as such, and the
    next one fresh."""
    return 1 if MASKED in state else 2


@dataclasses.dataclass(frozen=True)
class Count:
    """Target forwards, and blocks of rows in them: current and drafted states, finished blocks that were drafted; those
    that wait for their keys and values are left out."""

    forwards: int = 0
    blocks: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.forwards + other.forwards, self.blocks + other.blocks)


def replay(text: list[Block], plan: Planner, room: int) -> Count:
    """What it takes to decode a text where each forward sees the states that `plan` chooses.

    Args:
        room: blocks of rows that drafted states may take of a forward, all costs of `cost` together; the current state
            is not among them.

    Raises:
        ValueError: a plan takes more.
    """
    count, at, seen = Count(), 0, None
    left = iter(text)
    block = next(left)
    while block is not None:
        chosen = [] if seen is None else plan(block, seen, block.path[at], room)
        spent = sum(map(cost, chosen))
        if spent > room:
            raise ValueError(f"a plan of {len(chosen)} states takes {spent} blocks of rows, there is room for {room}")
        count += Count(1, 1 + spent)
        visible = {block.path[at], *chosen}
        while block is not None and block.path[at] in visible:
            seen, at = block.seen[at], at + 1
            if MASKED not in block.path[at]:
                carried = block.path[at] in visible
                block, at = next(left, None), 0
                if not carried:
                    seen = None
                    break
                visible = {block.path[0]} if block is not None else set()
    return count
