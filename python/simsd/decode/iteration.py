"""One iteration for a batch of slots: propose, plan, forward, verify, advance, report.

A function of static shape. It branches on no tensor's value, reads nothing on the host and uploads nothing, so that a
CUDA graph of it can be replayed whatever is accepted. Only a `ModelRunner` that packs rows (the CPU's) looks at values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import simsd_kernels as kernels
from simsd.decode import draft as drafting
from simsd.decode import seen as seeing
from simsd.decode import tops as topping
from simsd.decode.draft import run_plan
from simsd.decode.exchange import Commands, Report
from simsd.decode.lookup import draft_without_model
from simsd.decode.rows import STRIDE
from simsd.decode.shift import shifted, with_last_row
from simsd.decode.slots import Slots
from simsd.decode.temporal import Drafts, Temporal, TemporalPlan, draft_blocks, judge
from simsd.models.runner import ModelRunner
from simsd_kernels.ops import serving


@dataclasses.dataclass(frozen=True)
class Shape:
    """What fixes the shapes of an iteration, besides the slots themselves.

    Attributes:
        lookahead: K, blocks that a proposal may have, the current one included; 0: nothing is proposed.
        states: C, states of blocks that the target sees of each slot, the current one included.
        logits_rows: N, rows that the target computes logits for, at least one block of every slot.
        draft_blocks: blocks that a draft model may propose, 0..K; draft_steps: forwards for each.
        pending, draft_pending: blocks that may wait for their keys and values to be computed.
        self_draft: whether the target's own last logits propose current blocks, too. lookup: whether the texts
            themselves propose, see `lookup`. keeps_logits: whether a later
            iteration may ask for that.
        noise: whether any slot draws with noise. filters: whether any uses top-k, any top-p.
        allowed_ids: end tokens that are generated though they are banned otherwise.
        temporal: how drafts are judged as SimSD was published; None: exactly.
    """

    lookahead: int = 0
    states: int = 1
    logits_rows: int = 0
    draft_blocks: int = 0
    draft_steps: int = 1
    pending: int = 1
    draft_pending: int = 2
    self_draft: bool = False
    lookup: bool = False
    keeps_logits: bool = False
    noise: bool = False
    filters: tuple[bool, bool] = (False, False)
    allowed_ids: tuple[int, ...] = ()
    temporal: Temporal | None = None


@dataclasses.dataclass(frozen=True)
class Parts:
    """The parts of an iteration that audits, tests and benchmarks may put their own in place of.

    Attributes:
        forward: the target's forward of a plan.
        proposer: what a draft model proposes, as `draft.by_model`. drafter: the same of a temporal iteration, as
            `temporal.draft_blocks`.
        packed: whether rows that nobody needs are left out of forwards, for which the host must look; None: on the CPU.
    """

    forward: Callable[[ModelRunner, kernels.Plan | TemporalPlan, Slots, Shape], Tensor] = run_plan
    proposer: Callable[[Slots, Commands, ModelRunner, Shape], None] = drafting.by_model
    drafter: Callable[[Slots, Commands, ModelRunner, Shape], Drafts] = draft_blocks
    packed: bool | None = None


PARTS = Parts()


def iterate(
    slots: Slots,
    commands: Commands,
    target: ModelRunner,
    draft: ModelRunner | None,
    shape: Shape,
    report: Report,
    parts: Parts = PARTS,
) -> None:
    """Takes every slot that runs at least one denoising step on, updates `slots` in place and fills `report`."""
    drafts = propose(slots, commands, target, draft, shape, parts)
    verify(slots, commands, target, shape, report, drafts, parts)


def propose(
    slots: Slots,
    commands: Commands,
    target: ModelRunner,
    draft: ModelRunner | None,
    shape: Shape,
    parts: Parts = PARTS,
) -> Drafts | None:
    """Drafts what the commands ask for: into the slots' standing proposals; of a temporal shape, returns it."""
    if shape.self_draft or shape.lookup:
        draft_without_model(slots, commands, target, shape)
    return draft_with_model(slots, commands, draft, shape, parts)


def draft_with_model(
    slots: Slots, commands: Commands, draft: ModelRunner | None, shape: Shape, parts: Parts = PARTS
) -> Drafts | None:
    """The draft model's part of `propose`."""
    if shape.temporal is not None:
        return parts.drafter(slots, commands, draft, shape)
    if shape.draft_blocks:
        parts.proposer(slots, commands, draft, shape)
    return None


def verify(
    slots: Slots,
    commands: Commands,
    target: ModelRunner,
    shape: Shape,
    report: Report,
    drafts: Drafts | None,
    parts: Parts = PARTS,
) -> None:
    """One target forward over the states that the proposals lead to, and the target's own walk through them."""
    if shape.temporal is not None:
        return judge(slots, target, shape, report, drafts, parts.forward)
    plan = plan_states(slots, commands, target, shape)
    logits = parts.forward(target, plan, slots, shape)
    walk = walk_states(slots, logits, plan, shape)
    tops = None
    if slots.top_logprobs:
        tops = topping.of_walk(slots, logits, plan, walk, shape.allowed_ids, target.packed)
    advance(slots, walk, plan, shape, report)
    if tops is not None:
        report.write_tops(tops)
        topping.keep(slots, tops, report.finished)
    if shape.keeps_logits:
        target.keep_logits(logits)
        seeing.keep(slots, commands, plan, report)


def plan_states(slots: Slots, commands: Commands, target: ModelRunner, shape: Shape) -> kernels.Plan:
    drafted = slots.proposal(shape.lookahead)
    start = torch.where(commands.runs > 0, slots.start, -1)
    kv_len = with_last_row(slots.target_kv_len, start) if target.model.shift else slots.target_kv_len
    planned = serving("plan_block", slots.device)(
        *(slots.text, slots.revealed, start, slots.end, slots.step, kv_len),
        *(drafted.tokens, slots.proposal_depth, slots.draft_end, drafted.prob, drafted.log_odds, drafted.entropy),
        *(commands.calibration, drafted.sharpness, commands.min_visit_prob, commands.row_budget[:1]),
        *(slots.schedule, slots.steps, slots.strategy, slots.threshold, slots.sub_blocks),
        *drafting.noise_of(slots, shape),
        commands.peeks,
        *(seeing.seen_states(slots, commands, target, shape) or (None,) * 12),
        target.mask_token_id,
        shape.pending,
        *(shape.states, shape.logits_rows, target.scratch, target.kv_slots, STRIDE),
    )
    plan = kernels.Plan(*planned)
    return shifted(plan, start, kv_len, shape.pending) if target.model.shift else plan


def walk_states(slots: Slots, logits: Tensor, plan: kernels.Plan, shape: Shape) -> kernels.Walk:
    walked = serving("verify_graph", slots.device)(
        *(logits, plan.state_rows, plan.states, plan.state_revealed, plan.block),
        *(slots.draft_tokens[:, : shape.lookahead], plan.draft_blocks_in_rows, slots.proposal_depth),
        *(slots.start, slots.step, slots.step_map, slots.prob, slots.draw_logprob, slots.origin),
        *(slots.temperature, slots.schedule, slots.steps, slots.strategy, slots.threshold, slots.sub_blocks),
        *(slots.top_k if shape.filters[0] else None, slots.top_p if shape.filters[1] else None),
        *(slots.seed, slots.banned(shape.allowed_ids)),
    )
    return kernels.Walk(*walked)


def advance(slots: Slots, walk: kernels.Walk, plan: kernels.Plan, shape: Shape, report: Report) -> None:
    K = shape.lookahead
    serving("advance_slots", slots.device)(
        *(slots.text, slots.start, slots.revealed, slots.step, slots.step_map, slots.prob, slots.draw_logprob),
        *(slots.origin, slots.target_kv_len, slots.draft_kv_len, slots.last_rows),
        *(*slots.proposal(K), slots.proposal_depth, slots.draft_end),
        report.buffer,
        *(slots.end, slots.prompt_len, slots.request_epoch, slots.stop_ids),
        *walk,
        *(plan.state_rows, plan.block, plan.draft_blocks_in_rows),
    )
    report.draft_forwards.copy_(slots.draft_forwards)
    torch.sub(slots.start, slots.draft_kv_len, out=report.draft_lag)
    if shape.noise and K:
        finished = report.finished[:, None]
        kept = (torch.arange(K, device=slots.device) + finished).clamp(max=K - 1)
        slots.draft_logits[:, :K] = slots.draft_logits[slots.index[:, None], kept]
