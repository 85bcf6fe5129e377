"""Proposals for the target to verify: by a draft model, or from the target's own last logits (from the text itself:
`lookup`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import simsd_kernels as kernels
from simsd.config import STRATEGIES
from simsd.decode.exchange import LOOKUP_DRAFT, SELF_DRAFT, Commands
from simsd.decode.rows import STRIDE
from simsd.decode.shift import shifted, with_last_row
from simsd.decode.slots import Slots
from simsd.models.attention import unchecked
from simsd.models.runner import ModelRunner
from simsd_kernels.advance_slots.api import NO_END
from simsd_kernels.ops import serving

if TYPE_CHECKING:
    from simsd.decode.iteration import Shape

SEQUENTIAL = STRATEGIES.index("sequential")
OWN, MODEL, LOOKUP = 0, 1, 2  # columns of Slots.order_sharpness
# How far log-odds tell the target's order: its own well, those of another model hardly (another context, too), and the
# order of positions, which is all that a lookup knows, not at all.
DEFAULT_SHARPNESS = (1.0, 0.25, 0.0)
BEHIND = 1e-3  # log-odds or nats between a drafted position and those that the draft revealed before it


Forward = Callable[[ModelRunner, kernels.Plan, Slots, "Shape"], Tensor]


def noise_of(slots: Slots, shape: Shape) -> tuple[Tensor | None, ...]:
    """What `plan_block` draws the tokens of each state from."""
    if not shape.noise or not shape.lookahead:
        return (None,) * 6
    logits = slots.draft_logits[:, : shape.lookahead]
    return logits, slots.temperature, slots.top_k, slots.top_p, slots.seed, slots.banned(shape.allowed_ids)


def run_plan(model: ModelRunner, plan: kernels.Plan, slots: Slots, shape: Shape) -> Tensor:
    """A model's logits [N, V] of a plan. Slots and shape are for those who put theirs in its place."""
    # Where the host may look: how many rows of logits the plan asks for.
    count = max(int(plan.state_rows.amax()) + 1, 1) if model.packed else None
    return model.forward(
        *(plan.tokens, plan.positions, plan.slots, plan.clock, plan.birth, plan.death, plan.logits_index),
        logits_count=count,
    )


def from_last_logits(slots: Slots, commands: Commands, target: ModelRunner, shape: Shape) -> None:
    """Self-draft: what the target's logits for an earlier state of the current block say of its masked positions, also
    where a lookup goes on from there.

    It replaces a standing proposal: a draft model's was made of less.
    """
    own = (commands.mode == SELF_DRAFT) | (commands.mode == LOOKUP_DRAFT)
    chosen = own & (commands.runs > 0) & (slots.last_rows >= 0).any(1)
    rows = torch.where(chosen[:, None], slots.last_rows, -1)
    slots.draft_end.masked_fill_(chosen, NO_END)  # of the proposal that this one replaces
    _keep_logits(slots, target.last_logits, rows, 0, shape)
    _finish(slots, target.last_logits, rows, slots.revealed, slots.step, 0, shape)
    _set_sharpness(slots, chosen, 0, OWN)


def by_model(slots: Slots, commands: Commands, draft: ModelRunner, shape: Shape, forward: Forward = run_plan) -> None:
    """The draft model proposes what is not proposed yet, block after block, `draft_steps` forwards each: behind the
    current block it sees the proposed ones, whose clean rows ride along. It stops behind a block in which it ended the
    text, and where it lags behind the text by more than the forward has rows for."""
    left = (slots.end - slots.start).div(slots.length, rounding_mode="floor")  # blocks of the text
    wanted = torch.where((commands.runs > 0) & (slots.start >= 0), commands.depth.minimum(left), 0)
    if draft.packed and not (slots.proposal_depth < wanted.minimum(slots.draft_end)).any():
        return
    for k in range(shape.draft_blocks):
        begin = slots.start + k * slots.length
        here = (slots.proposal_depth == k) & (wanted.minimum(slots.draft_end) > k)
        here &= begin - slots.draft_kv_len <= shape.draft_pending * slots.length
        if draft.packed and not here.any():
            continue
        state = slots.revealed, slots.step
        if k > 0:
            state = torch.zeros_like(slots.revealed), torch.zeros_like(slots.step)
        _propose_block(slots, draft, torch.where(here, begin, -1), *state, k, shape, forward)
        slots.draft_kv_len.copy_(torch.where(here, begin, slots.draft_kv_len))
        _set_sharpness(slots, here, k, MODEL)


def _propose_block(
    slots: Slots,
    draft: ModelRunner,
    at: Tensor,
    revealed: Tensor,
    step: Tensor,
    k: int,
    shape: Shape,
    forward: Forward,
) -> None:
    """Block number k, which begins at `at` (negative: not in this slot), from its state (revealed, step)."""
    stage = None
    if shape.draft_steps > 1:
        revealed, step = revealed.clone(), step.clone()
        stage = torch.full_like(slots.step_map, shape.draft_steps - 1)
    for n in range(shape.draft_steps):
        logits, rows = state_logits(slots, draft, at, revealed, step, shape, forward)
        slots.draft_forwards.add_(at >= 0)
        if n < shape.draft_steps - 1:
            newly, drawn = denoise(slots, logits, rows, at, revealed, step, shape)
            for mine, new in zip(
                (slots.draft_prob, slots.draft_log_odds, slots.draft_entropy), drawn[1:], strict=False
            ):
                mine[:, k] = torch.where(newly, new, mine[:, k])
            _keep_logits(slots, logits, torch.where(newly, rows, -1), k, shape)
            stage = torch.where(newly, n, stage)
    _keep_logits(slots, logits, rows, k, shape)
    if stage is not None:  # a block that has nothing masked any more takes part, too
        rows = torch.where((at >= 0)[:, None], rows.clamp(min=0), -1)
    _finish(slots, logits, rows, revealed, step, k, shape)
    if stage is not None:
        _order(slots, at >= 0, k, stage, shape.draft_steps)


def state_logits(
    slots: Slots,
    model: ModelRunner,
    at: Tensor,
    revealed: Tensor,
    step: Tensor,
    shape: Shape,
    forward: Forward = run_plan,
) -> tuple[Tensor, Tensor]:
    """A forward of a draft model on one state of a block: logits [B * L, V], and the row of each masked position, int32
    [B, L], -1 elsewhere."""
    nothing = slots.proposal(0)
    kv_len = with_last_row(slots.draft_kv_len, at) if model.model.shift else slots.draft_kv_len
    planned = serving("plan_block", slots.device)(
        *(slots.text, revealed, at, slots.end, step, kv_len),
        *(nothing.tokens, slots.nothing, slots.draft_end, nothing.prob, nothing.log_odds, nothing.entropy),
        *(slots.prob[:, 0], nothing.sharpness, slots.temperature, slots.nothing[:1]),
        *(slots.schedule, slots.steps, slots.strategy, slots.threshold, slots.sub_blocks),
        *(None,) * 19,
        *(model.mask_token_id, shape.draft_pending, 1, slots.count * slots.length),
        *(model.scratch, model.kv_slots, STRIDE),
    )
    plan = kernels.Plan(*planned)
    if model.model.shift:
        plan = shifted(plan, at, kv_len, shape.draft_pending)
    return forward(model, plan, slots, shape), plan.state_rows[:, 0]


def denoise(
    slots: Slots, logits: Tensor, rows: Tensor, at: Tensor, revealed: Tensor, step: Tensor, shape: Shape
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One denoising step of the blocks at `at`, by each slot's own rule; updates text, `revealed` and `step`.

    Returns:
        bool [B, L], what it revealed; token, prob, log_odds, entropy, draw_logprob [B, L] as drawn, of meaning where
        rows >= 0.
    """
    length = slots.length
    keyed = torch.where(slots.strategy == SEQUENTIAL, 0, revealed)
    settings = (slots.temperature, slots.top_k, slots.top_p, slots.seed)
    drawn = unchecked(kernels.sample_logits, slots.device, logits.dtype)(
        logits[rows.clamp(min=0).flatten()],
        *(x.repeat_interleave(length) for x in settings),
        slots.span(at.clamp(min=0)).flatten(),
        keyed.repeat_interleave(length),
        slots.banned(shape.allowed_ids),
    )
    token, prob, log_odds, entropy, _, draw_logprob = (x.view(-1, length) for x in drawn)
    places = slots.span(at.clamp(min=0)).long()
    tokens = slots.text.gather(1, places)
    newly = serving("reveal", slots.device)(
        *(tokens, revealed, torch.zeros_like(slots.step_map), token, prob, log_odds, entropy),
        torch.where(at >= 0, step, -1),
        *(slots.schedule, slots.steps, slots.strategy, slots.threshold, slots.sub_blocks),
    )
    slots.text.scatter_(1, places, tokens)
    step.add_(at >= 0)
    return slots.bits_in(newly), (token, prob, log_odds, entropy, draw_logprob)


def _finish(slots: Slots, logits: Tensor, rows: Tensor, revealed: Tensor, step: Tensor, k: int, shape: Shape) -> None:
    """Proposes block k: what is masked, on these logits alone."""
    serving("propose_block", slots.device)(
        *(logits, rows, slots.text, slots.start, revealed, step),
        *(slots.draft_tokens, slots.draft_prob, slots.draft_log_odds, slots.draft_entropy),
        *(slots.proposal_depth, slots.draft_end, slots.prompt_len, slots.stop_ids),
        *(slots.temperature, slots.schedule, slots.steps, slots.strategy, slots.threshold, slots.sub_blocks),
        *(slots.top_k if shape.filters[0] else None, slots.top_p if shape.filters[1] else None),
        *(slots.seed, slots.banned(shape.allowed_ids)),
        *(k, int(shape.noise)),
    )


def _keep_logits(slots: Slots, logits: Tensor, rows: Tensor, k: int, shape: Shape) -> None:
    """With noise, `plan_block` draws the tokens of each state anew: from the logits that tell of a position."""
    if shape.noise:
        new = logits[rows.clamp(min=0)]  # [B, L, V]
        slots.draft_logits[:, k] = torch.where((rows >= 0)[:, :, None], new, slots.draft_logits[:, k])


def _set_sharpness(slots: Slots, where: Tensor, k: int, kind: int) -> None:
    slots.draft_sharpness[:, k] = torch.where(where, slots.order_sharpness[:, kind], slots.draft_sharpness[:, k])


def _order(slots: Slots, where: Tensor, k: int, stage: Tensor, stages: int) -> None:
    """Makes positions of a later `stage` (int [B, L]) of the draft rank behind those of an earlier one: statistics of
    different contexts do not compare."""
    log_odds, entropy = slots.draft_log_odds[:, k], slots.draft_entropy[:, k]
    for now in range(1, stages):
        before, here = stage < now, (stage == now) & where[:, None]
        lowest = torch.where(before, log_odds, torch.inf).amin(1, keepdim=True) - BEHIND
        highest = torch.where(before, entropy, -torch.inf).amax(1, keepdim=True) + BEHIND
        log_odds = torch.where(here, log_odds.minimum(lowest), log_odds)
        entropy = torch.where(here, entropy.maximum(highest), entropy)
    slots.draft_log_odds[:, k], slots.draft_entropy[:, k] = log_odds, entropy
