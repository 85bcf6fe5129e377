"""SimSD as published: the draft denoises a block, the target judges it in one forward over the temporal layout (arXiv
2606.02544), and what becomes of a rejected tail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

import simsd_kernels as kernels
from simsd.decode.draft import SEQUENTIAL, denoise, state_logits
from simsd.decode.exchange import BONUS, DRAFTED, TAIL, UNDRAFTED, Commands, Report
from simsd.decode.rows import key_lifetimes, pending_rows, temporal_rows
from simsd.decode.slots import Slots
from simsd.decode.tops import of_block
from simsd.models.attention import unchecked
from simsd.models.runner import ModelRunner
from simsd_kernels import noise
from simsd_kernels.banned import is_banned

if TYPE_CHECKING:
    from simsd.decode.iteration import Shape

COIN, RESIDUAL = 0, 1  # what a uniform variate of `mrs` is for


@dataclasses.dataclass(frozen=True)
class Temporal:
    """How a draft is judged: `accept` and `rejected_tail` as in `SamplingParams`; gates: whether any request has an
    `end_gate`."""

    accept: str
    rejected_tail: str
    gates: bool = False


@dataclasses.dataclass
class Drafts:
    """Drafted blocks, [B, L] each: tokens (the mask token where nothing was drafted), step_map (1-based, 0 where known
    or masked), drawn_under (the set that a position's noise was keyed by), draw_logprob (of the draft's draw); revealed
    int64 [B]; logits [B, L, V] that each token was drawn from, None unless the rule needs them; at int32 [B], where
    they begin, -1 in idle slots."""

    tokens: Tensor
    step_map: Tensor
    drawn_under: Tensor
    draw_logprob: Tensor
    revealed: Tensor
    logits: Tensor | None
    at: Tensor

    def to(self, device: torch.device) -> Drafts:
        """The same there; where they are there, they themselves."""
        return Drafts(**{name: x if x is None else x.to(device) for name, x in vars(self).items()})

    def copy(self, other: Drafts) -> None:
        """Becomes what the other is, on whatever device."""
        for name, mine in vars(self).items():
            if mine is not None:
                mine.copy_(getattr(other, name), non_blocking=True)


def draft_blocks(slots: Slots, commands: Commands, draft: ModelRunner, shape: Shape) -> Drafts:
    """SDAR's denoising loop with the draft model, `draft_steps` forwards; slots that are done give dead rows."""
    at = torch.where(commands.runs > 0, slots.start, -1)
    revealed, step = slots.revealed.clone(), torch.zeros_like(slots.step)
    step_map = torch.zeros_like(slots.step_map)
    drawn_under = torch.zeros_like(step_map, dtype=torch.int64)
    draw_logprob = torch.zeros_like(slots.draw_logprob)
    kept = None
    for _ in range(shape.draft_steps):
        here = torch.where(slots.bits_in(revealed).all(1), -1, at)
        if draft.packed and not (here >= 0).any():
            break
        logits, rows = state_logits(slots, draft, here, revealed, step, shape)
        slots.draft_kv_len.copy_(torch.where(here >= 0, here, slots.draft_kv_len))
        slots.draft_forwards.add_(here >= 0)
        key = torch.where(slots.strategy == SEQUENTIAL, 0, revealed)
        now = step + 1
        newly, drawn = denoise(slots, logits, rows, here, revealed, step, shape)
        step_map = torch.where(newly, now[:, None], step_map)
        drawn_under = torch.where(newly, key[:, None], drawn_under)
        draw_logprob = torch.where(newly, drawn[-1], draw_logprob)
        if shape.temporal.accept == "mrs":
            new = logits[rows.clamp(min=0)]
            kept = torch.where(newly[:, :, None], new, torch.zeros_like(new) if kept is None else kept)
    tokens = slots.text.gather(1, slots.span(at.clamp(min=0)).long())
    tokens = torch.where(slots.bits_in(revealed), tokens, min(draft.mask_token_id, draft.vocabulary - 1))
    return Drafts(tokens, step_map, drawn_under, draw_logprob, revealed, kept, at)


class TemporalPlan(NamedTuple):
    """One forward over the temporal layout: what of `simsd_kernels.Plan` a forward takes. state_rows: int32 [B, L],
    where each position is in logits_index."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    clock: Tensor
    birth: Tensor
    death: Tensor
    logits_index: Tensor
    state_rows: Tensor


def judge(
    slots: Slots,
    target: ModelRunner,
    shape: Shape,
    report: Report,
    drafts: Drafts,
    forward: Callable[[ModelRunner, TemporalPlan, Slots, Shape], Tensor],
) -> None:
    """One target forward over every drafted block; what it leaves of each is committed."""
    known = slots.bits_in(slots.revealed).sum(1, dtype=torch.int32)  # a prefix of the block
    plan = _plan(slots, target, drafts, known, shape)
    logits = forward(target, plan, slots, shape).view(slots.count, slots.length, -1)
    accepted, *judged = unchecked(kernels.block_verify, slots.device, logits.dtype)(
        logits,
        drafts.tokens,
        known,
        drafts.revealed,
        slots.temperature,
        slots.top_k if shape.filters[0] else None,
        slots.top_p if shape.filters[1] else None,
        slots.seed,
        slots.span(drafts.at.clamp(min=0)),
        drafts.drawn_under,
        banned=slots.banned(shape.allowed_ids),
        rule=shape.temporal.accept,
        **_coins(slots, drafts, known, shape),
    )
    verdict = settle(slots, shape, logits, drafts, known, *judged)
    _commit(slots, drafts, verdict, known, accepted, report)
    if slots.top_logprobs:
        report.write_tops(of_block(slots, logits, verdict.tokens.clamp(min=0), shape.allowed_ids))


def _plan(slots: Slots, target: ModelRunner, drafts: Drafts, known: Tensor, shape: Shape) -> TemporalPlan:
    """Asks for the logits that judge each position: of the row that tells of it, of any where it is known."""
    length, live = slots.length, drafts.at >= 0
    begin = drafts.at.clamp(min=0)
    last = slots.text.gather(1, (begin - 1).clamp(min=0).long()[:, None])[:, 0] if target.model.shift else None
    rows = temporal_rows(drafts.tokens, drafts.step_map, known, begin, target.scratch, target.mask_token_id, last).only(
        live
    )
    birth, death = key_lifetimes(rows, drafts.at, length, target.kv_slots)
    rows = pending_rows(slots.text, slots.target_kv_len, drafts.at, shape.pending * length, length).followed_by(rows)
    width = rows.tokens.shape[1]
    judged = torch.where(slots.offsets < known[:, None], shape.pending * length, width - length) + slots.offsets
    asked = (slots.index[:, None] * width + judged).flatten()
    every = torch.arange(asked.numel(), dtype=torch.int32, device=asked.device).view(slots.count, length)
    return TemporalPlan(rows.tokens, rows.positions, rows.slots, rows.clock, birth, death, asked, every)


def _coins(slots: Slots, drafts: Drafts, known: Tensor, shape: Shape) -> dict[str, Tensor]:
    """Uniform variates of `mrs`, in [0, 1): Philox keyed by a sequence's seed and by what they are for.

    The counter is (position, 2**32 - 1 - purpose, known positions of the block, 0), which no token's noise has: a
    position is judged anew with fresh coins.
    """
    if shape.temporal.accept != "mrs":
        return {}
    where = slots.span(drafts.at.clamp(min=0)).long()  # [B, L]
    position = torch.cat([where, where[:, :1]], 1)  # [B, L + 1], the residual's last
    purpose = torch.full_like(position, noise.WORD - COIN)
    purpose[:, -1] = noise.WORD - RESIDUAL
    seed = slots.seed[:, None]
    key = seed & noise.WORD, (seed >> 32) & noise.WORD
    word, *_ = noise.philox4x32((position, purpose, known.long()[:, None], torch.zeros_like(position)), key)
    uniform = (word >> 8).float() * 2.0**-24
    coin, residual = uniform[:, :-1].contiguous(), uniform[:, -1].contiguous()
    return {"draft_logits": drafts.logits, "coin": coin, "residual": residual}


@dataclasses.dataclass
class Verdict:
    """What a verification leaves of each block: tokens int64, prob, logprob, draw_logprob float32, origin int32
    [B, L]; positions before `stop` (int [B]) stay. bonus: bool [B], whether the target's own token behind the accepted
    ones is among them."""

    tokens: Tensor
    prob: Tensor
    logprob: Tensor
    draw_logprob: Tensor
    origin: Tensor
    stop: Tensor
    bonus: Tensor


def settle(
    slots: Slots,
    shape: Shape,
    logits: Tensor,
    drafts: Drafts,
    known: Tensor,
    bonus: Tensor,
    tokens: Tensor,
    target_ids: Tensor,
    prob: Tensor,
    draw_logprob: Tensor,
) -> Verdict:
    """Applies the rejected-tail policy and the end gate to what `block_verify` returned."""
    index, length, rule = slots.offsets, slots.length, shape.temporal
    stop = (tokens >= 0).int().cumprod(1).sum(1)
    has_bonus = bonus >= 0
    drafted = drafts.step_map > 0
    is_bonus = has_bonus[:, None] & (index == stop[:, None] - 1)
    origin = torch.where(is_bonus, BONUS, torch.where(drafted, DRAFTED, UNDRAFTED))
    logprob = prob.log()
    if rule.rejected_tail == "truncate_no_bonus":
        dropped = has_bonus & (stop - 1 > known)
        stop, has_bonus = stop - dropped.int(), has_bonus & ~dropped
    elif rule.rejected_tail != "truncate":
        if rule.rejected_tail == "target_argmax_all":
            replaced = (index >= known[:, None]) & ~is_bonus & (tokens != target_ids)
        else:
            replaced = index >= stop[:, None]
        replaced &= has_bonus[:, None]
        keeps = drafted if rule.rejected_tail == "draft_argmax" else torch.zeros_like(drafted)
        tokens = torch.where(replaced, torch.where(keeps, drafts.tokens, target_ids), tokens)
        origin = torch.where(replaced, TAIL, origin)
        # The draft's draw, or the target's: behind the stop the op told of it, before it replaces by an argmax alone.
        own = torch.where(index >= stop[:, None], draw_logprob, 0.0)
        own = torch.where(keeps, drafts.draw_logprob, own)
        draw_logprob = torch.where(replaced, own, draw_logprob)
        # The op judged others there: the target's probability of what was put in their place.
        banned = slots.banned(shape.allowed_ids)
        logs = _log_probs(slots, logits, banned).gather(2, tokens.clamp(min=0)[:, :, None]).squeeze(2)
        prob, logprob = torch.where(replaced, logs.exp(), prob), torch.where(replaced, logs, logprob)
        stop = torch.where(has_bonus, length, stop)
    verdict = Verdict(tokens, prob, logprob, draw_logprob, origin.int(), stop, has_bonus)
    return _gate_ends(slots, shape, logits, known, is_bonus, verdict) if rule.gates else verdict


def _gate_ends(
    slots: Slots, shape: Shape, logits: Tensor, known: Tensor, is_bonus: Tensor, verdict: Verdict
) -> Verdict:
    """Drops a bonus end token that the target gives less than the request's `end_gate`.

    Where it is the only token, or a whole block is kept, the target's best other token takes its place, so that every
    verification makes progress.
    """
    ends = (verdict.tokens[:, :, None] == slots.stop_ids[:, None]).any(2)  # [B, L]
    gated = is_bonus & verdict.bonus[:, None] & ends & (verdict.prob < slots.end_gate[:, None])
    if shape.temporal.rejected_tail.startswith("truncate"):
        dropped = gated.any(1) & (verdict.stop - 1 > known)
        verdict.stop = verdict.stop - dropped.int()
        verdict.bonus = verdict.bonus & ~dropped
        gated &= ~dropped[:, None]
    logs = _log_probs(slots, logits, slots.banned(shape.allowed_ids))  # [B, L, V]
    ids = slots.stop_ids.clamp(min=0)[:, None].expand(-1, logs.shape[1], -1)
    without = torch.where(slots.stop_ids[:, None] >= 0, -torch.inf, logs.gather(2, ids))
    best, token = logs.scatter(2, ids, without).max(2)
    verdict.tokens = torch.where(gated, token, verdict.tokens)
    verdict.prob = torch.where(gated, best.exp(), verdict.prob)
    verdict.logprob = torch.where(gated, best, verdict.logprob)
    verdict.draw_logprob = torch.where(gated, 0.0, verdict.draw_logprob)
    return verdict


def _log_probs(slots: Slots, logits: Tensor, banned: Tensor) -> Tensor:
    """[B, L, V] of what a token's probability is taken of: no filters, temperature 0 counts as 1."""
    heat = torch.where(slots.temperature > 0, slots.temperature, 1.0)[:, None, None]
    x = logits.float() / heat
    return x.masked_fill(is_banned(banned, x.shape[2], x.device), -torch.inf).log_softmax(2)


def _commit(slots: Slots, drafts: Drafts, verdict: Verdict, known: Tensor, accepted: Tensor, report: Report) -> None:
    """Takes the verdicts over into the slots, and reports them as `advance_slots` does."""
    length, index, live = slots.length, slots.offsets, drafts.at >= 0
    begin = drafts.at.clamp(min=0)
    new = live[:, None] & (index >= known[:, None]) & (index < verdict.stop[:, None])  # [B, L]
    places = slots.span(begin).long()
    text = slots.text.gather(1, places)
    tokens = torch.where(new, verdict.tokens, text)
    slots.text.scatter_(1, places, tokens)
    steps = torch.where(drafts.step_map > 0, drafts.step_map, slots.steps[:, None] + 1)
    finished = (live & (verdict.stop == length)).int()
    # A tail token is not the target's choice: its probability may vanish.
    failed = (new & ~(verdict.prob > 0) & (verdict.origin != TAIL)).any(1)
    is_end = (verdict.tokens[:, :, None] == slots.stop_ids[:, None]).any(2)
    ended = (new & is_end).any(1) | (live & (begin + finished * length >= slots.end))
    revealed = torch.where(index < verdict.stop[:, None], 1 << index.long(), 0).sum(1)
    revealed = torch.where(finished > 0, 0, revealed)
    slots.target_kv_len.copy_(torch.where(live, begin, slots.target_kv_len))
    slots.revealed.copy_(torch.where(live, revealed, slots.revealed))
    moved = torch.where(failed | ended, -1, begin + finished * length)
    slots.start.copy_(torch.where(live, moved, slots.start))
    judged = ((drafts.step_map > 0) & (index >= known[:, None])).sum(1)
    report.write(
        live=live,
        epoch=slots.request_epoch,
        finished=finished,
        judged=judged,
        accepted=accepted,
        failed=failed,
        ended=ended,
        revealed=revealed,
        tokens=tokens,
        steps=torch.where(new, steps, 0),
        prob=torch.where(new, verdict.prob, 1.0),
        draw_logprob=torch.where(new, verdict.draw_logprob, 0.0),
        origin=verdict.origin,
        logprob=verdict.logprob,
    )
    report.draft_forwards.copy_(slots.draft_forwards)
    torch.sub(slots.start, slots.draft_kv_len, out=report.draft_lag)
