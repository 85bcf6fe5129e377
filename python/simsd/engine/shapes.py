"""Which requests share an iteration, and the shape of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from simsd.config import EngineConfig, SamplingParams
from simsd.decode.exchange import SELF_DRAFT
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
    if params.verify == "none" or params.drafter == "self" or not has_draft:
        fitting = (group for group in others if group.temporal is None and group.allowed_ids == allowed_ids)
        return next(fitting, Group(1, allowed_ids))
    return Group(params.draft_steps or 1, allowed_ids)


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
) -> Shape:
    """The shape of an iteration of `occupants`, drafted for in `modes` (both of the slots that take part).

    Args:
        slots: B. static: shapes are captured, so few of them should come up; else rows that nobody needs cost nothing.
        self_drafts: whether a later iteration may draft from this one's logits.
    """
    params = [occupant.request.params for occupant in occupants]
    common = {
        "draft_steps": group.draft_steps,
        "allowed_ids": group.allowed_ids,
        "noise": any(p.temperature > 0 for p in params),
        "filters": (any(p.top_k > 0 for p in params), any(p.top_p < 1 for p in params)),
        "pending": 1 if static else max(1, *(occupant.pending // block_length for occupant in occupants)),
        "draft_pending": 2 if static else max(2, *(occupant.draft_lag // block_length for occupant in occupants)),
    }
    if group.temporal is not None:
        return Shape(lookahead=1, temporal=group.temporal, **common)
    depth = max(mode.depth for mode in modes)
    own = any(mode.kind == SELF_DRAFT for mode in modes)
    standing = max(occupant.standing for occupant in occupants)
    lookahead = max(depth, int(own), standing)
    if all(mode == NONE for mode in modes):
        lookahead = 0
    states = states_needed(config, block_length) if lookahead else 1
    if static and lookahead:
        each = 1 + row_budget(config, len(occupants)) // (block_length * slots)
        states = min(states, 1 << (each.bit_length() - 1))
        if depth:
            depth = lookahead = config.lookahead
    return Shape(
        lookahead=lookahead,
        states=states,
        logits_rows=slots * states * block_length,
        draft_blocks=depth,
        self_draft=own,
        keeps_logits=self_drafts,
        **common,
    )
