"""Which requests share an iteration, and the shape of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from simsd.config import MAX_LOOKAHEAD, EngineConfig, SamplingParams
from simsd.decode.exchange import LOOKUP_DRAFT, SELF_DRAFT
from simsd.decode.iteration import Shape
from simsd.decode.rows import STRIDE
from simsd.decode.temporal import Temporal
from simsd.engine.scheduler import Occupant
from simsd.engine.tuner import NONE, DraftMode

DEFAULT_ROWS = 128  # rows that drafted states of one slot take at most where max_rows does not say


@dataclasses.dataclass(frozen=True)
class Group:
    """What requests of one iteration have in common: `draft_steps` forwards of the draft for each block, how temporal
    drafts are judged (None: exactly, or none are), and end tokens that may be generated though the model bans them."""

    draft_steps: int
    allowed_ids: tuple[int, ...] = ()
    temporal: Temporal | None = None


def group_of(
    params: SamplingParams,
    allowed_ids: tuple[int, ...],
    block_length: int,
    others: Iterable[Group],
    has_draft: bool = True,
) -> Group:
    """The group of a request; one that no draft model drafts for joins any of the `others` that is exact."""
    if params.verify == "temporal":
        steps = params.block_steps(block_length)
        return Group(
            min(params.draft_steps or steps, steps),
            allowed_ids,
            Temporal(params.accept, params.rejected_tail, params.end_gate > 0),
        )
    if not params.asks_draft_model or not has_draft:
        fitting = (group for group in others if group.temporal is None and group.allowed_ids == allowed_ids)
        return next(fitting, Group(1, allowed_ids))
    return Group(params.draft_steps or 1, allowed_ids)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The next `tokens` of the prompts in these slots, which a forward of their own computes; `behind`: slots whose
    prompts lack too much to come along with the iteration after it."""

    slots: list[int]
    tokens: int
    behind: set[int]


def prefill_chunk(lacking: list[tuple[int, int]], free: int, most: int, along: int, length: int) -> Chunk:
    """
    Args:
        lacking: slots, the first to be served first, and the tokens, whole blocks, whose keys and values they lack.
        free: as many come along with every iteration.
        most: tokens that a chunk and what comes along have at most, over all slots.
        along: tokens of one slot that may come along.
        length: of a block.
    """
    room, slots, tokens = most, [], 0
    late = {slot: lack for slot, lack in lacking if lack > free}
    for slot, lack in list(late.items()):
        if lack <= min(along, room) and not slots:
            room -= late.pop(slot)
            continue
        width = max(tokens, min(lack, room) // length * length)
        if 0 < width * (len(slots) + 1) <= room:
            slots.append(slot)
            tokens = width
    for slot in slots:
        late[slot] -= tokens
    return Chunk(slots, tokens, {slot for slot, lack in late.items() if lack > free})


def turns_of(
    occupied: Iterable[tuple[int, Occupant]], block_length: int, has_draft: bool
) -> list[tuple[Group, list[int]]]:
    """Slots that run together, group after group; behind them those whose request has to run alone."""
    groups: dict[Group, list[int]] = {}
    alone = []
    for slot, occupant in occupied:
        group = group_of(occupant.request.params, occupant.allowed_ids, block_length, groups, has_draft)
        if occupant.request.runs_alone:
            alone.append((group, [slot]))
        else:
            groups.setdefault(group, []).append(slot)
    return [*groups.items(), *alone]


def drafted_blocks(config: EngineConfig) -> int:
    """Blocks that a proposal has room for: where the draft works beside the target, those of two iterations."""
    return config.lookahead if config.draft_device is None else min(2 * config.lookahead, MAX_LOOKAHEAD)


def states_needed(config: EngineConfig, block_length: int) -> int:
    """C: states of blocks that one target forward may see of a slot, the current one included."""
    rows = DEFAULT_ROWS if config.max_rows is None else config.max_rows
    return min(1 + rows // block_length, STRIDE // 4)


def row_budget(config: EngineConfig, active: int) -> int:
    """Rows that drafted states may add to an iteration."""
    return DEFAULT_ROWS * active if config.max_rows is None else config.max_rows


def shape_of(
    group: Group,
    occupants: list[Occupant],
    modes: list[DraftMode],
    config: EngineConfig,
    block_length: int,
    slots: int,
    static: bool,
    self_drafts: bool,
    beside: bool = False,
) -> Shape:
    """The shape of an iteration of `occupants`, drafted for in `modes` (both of the slots that take part).

    Args:
        slots: B. static: shapes are captured, so few of them should come up; else rows that nobody needs cost nothing.
        self_drafts: whether a later iteration may draft from this one's logits.
        beside: whether a draft model works beside the target: how much it has proposed is not known here then.
    """
    params = [occupant.request.params for occupant in occupants]
    lags = [occupant.draft_lag for occupant in occupants if occupant.request.params.asks_draft_model]
    common = {
        "draft_steps": group.draft_steps,
        "allowed_ids": group.allowed_ids,
        "noise": any(p.temperature > 0 for p in params),
        "filters": (any(p.top_k > 0 for p in params), any(p.top_p < 1 for p in params)),
        "pending": 1 if static else max(1, *(occupant.pending // block_length for occupant in occupants)),
        "draft_pending": 2 if static else max([2, *(lag // block_length for lag in lags)]),
    }
    if group.temporal is not None:
        return Shape(lookahead=1, temporal=group.temporal, **common)
    depth = max(mode.depth for mode in modes)
    lookup = any(mode.kind == LOOKUP_DRAFT for mode in modes)
    own = any(
        mode.kind == SELF_DRAFT or (mode.kind == LOOKUP_DRAFT and occupant.masked > 0)
        for mode, occupant in zip(modes, occupants, strict=True)
    )
    standing = max(occupant.standing for occupant in occupants)
    lookahead = max(depth, int(own), standing, config.lookahead if lookup else 0)
    if all(mode == NONE for mode in modes):
        lookahead = 0
    elif beside:
        depth, lookahead = depth and drafted_blocks(config), config.lookahead
    states = states_needed(config, block_length) if lookahead else 1
    if static and lookahead:
        each = 1 + row_budget(config, len(occupants)) // (block_length * slots)
        states = min(states, 1 << (each.bit_length() - 1))
        if depth and not beside:
            depth = lookahead = config.lookahead
    return Shape(
        lookahead=lookahead,
        states=states,
        logits_rows=slots * states * block_length,
        draft_blocks=depth,
        self_draft=own,
        lookup=lookup,
        keeps_logits=self_drafts,
        **common,
    )
