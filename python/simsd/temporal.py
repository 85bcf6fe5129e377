"""SimSD as published: the draft denoises a block, the target judges it in one forward over the temporal layout, and
what becomes of a rejected tail."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

import simsd_kernels as kernels
from simsd import layouts
from simsd.ambient import undisturbed
from simsd.config import GenerationConfig
from simsd.drafting import Sampler
from simsd.lanes import Lanes
from simsd.side import Side


@dataclasses.dataclass
class Verdict:
    """What one verification leaves of a block, from its first unknown position on: lists of equal length."""

    tokens: list[int]
    steps: list[int]
    probs: list[float]
    logprobs: list[float]
    origins: list[str]
    drafted: int
    accepted: int
    bonus: int
    draft_forwards: int = 0


@dataclasses.dataclass
class Drafts:
    """Drafted blocks, [B, L] each: tokens (the mask token where nothing was drafted), step_map (1-based, 0 where known
    or masked), drawn_under (the set that a position's noise was keyed by); logits [B, L, V] that each token was drawn
    from, None unless the rule needs them. known, forwards: on the host, by lane."""

    tokens: Tensor
    revealed: Tensor
    step_map: Tensor
    drawn_under: Tensor
    logits: Tensor | None
    known: list[int]
    forwards: list[int]


class Temporal:
    def __init__(
        self,
        lanes: Lanes,
        target: Side,
        draft: Side,
        sampler: Sampler,
        config: GenerationConfig,
        end_ids: tuple[int, ...],
    ) -> None:
        self.lanes, self.target, self.draft = lanes, target, draft
        self.sampler, self.config, self.end_ids = sampler, config, end_ids
        self.generators: list[torch.Generator | None] = [None] * lanes.count

    def open(self, lane: int, seed: int) -> None:
        self.generators[lane] = torch.Generator(self.lanes.device).manual_seed(seed % 2**64)

    @torch.inference_mode()
    @undisturbed()
    def step(self, lengths: list[int]) -> dict[int, Verdict]:
        """Drafts and verifies one block in every lane in use; `lengths`: committed tokens by lane. Each verdict holds
        at least one token; the caller commits it."""
        known = [length - start if start >= 0 else 0 for length, start in zip(lengths, self.lanes.starts, strict=True)]
        drafts = self._draft(known)
        return self._verify(drafts)

    def _draft(self, known: list[int]) -> Drafts:
        """SDAR's denoising loop with the draft model, until no mask is left or `draft_steps` are done."""
        lanes, sampler, config = self.lanes, self.sampler, self.config
        length, side = lanes.length, self.draft
        drafts = Drafts(
            tokens=lanes.block(side.model.mask_token_id),
            revealed=lanes.revealed.clone(),
            step_map=torch.zeros_like(lanes.step_map),
            drawn_under=torch.zeros_like(lanes.step_map, dtype=torch.int64),
            logits=None,
            known=known,
            forwards=[0] * lanes.count,
        )
        if config.accept == "mrs":
            shape = (lanes.count, length, side.model.vocab_size)
            drafts.logits = torch.zeros(shape, dtype=side.model.dtype, device=lanes.device)
        busy = [lane for lane, start in enumerate(lanes.starts) if start >= 0]
        for step in range(min(config.draft_steps or sampler.steps, sampler.steps)):
            at = torch.tensor(busy, device=lanes.device)
            live = torch.zeros(lanes.count, dtype=torch.bool, device=lanes.device).index_fill_(0, at, True)
            rows = layouts.state_rows(drafts.tokens, lanes.start, side.scratch).only(live)
            ends = [start if lane in busy else -1 for lane, start in enumerate(lanes.starts)]
            logits, index = side.forward(lanes, ends, rows, live[:, None].expand(-1, length), None)
            logits = logits[index[at].flatten().long()]
            key = sampler.key(drafts.revealed[at])
            part = drafts.tokens[at], drafts.revealed[at], drafts.step_map[at]
            drawn = sampler.draw(lanes, at, logits, lanes.start[at], key)
            newly = sampler.reveal(*part, *drawn, torch.full_like(lanes.step[at], step))
            drafts.tokens[at], drafts.revealed[at], drafts.step_map[at] = part
            chosen = lanes.bits_in(newly)  # [n, L]
            drafts.drawn_under[at] = torch.where(chosen, key[:, None], drafts.drawn_under[at])
            if drafts.logits is not None:
                new = logits.view(len(busy), length, -1)
                drafts.logits[at] = torch.where(chosen[:, :, None], new, drafts.logits[at])
            for lane in busy:
                drafts.forwards[lane] += 1
            open_ = (~lanes.bits_in(drafts.revealed)).any(1).tolist()
            busy = [lane for lane in busy if open_[lane]]
            if not busy:
                break
        return drafts

    def _verify(self, drafts: Drafts) -> dict[int, Verdict]:
        lanes, sampler, config, length = self.lanes, self.sampler, self.config, self.lanes.length
        known = torch.tensor(drafts.known, dtype=torch.int32, device=lanes.device)
        mask_id = self.target.model.mask_token_id
        rows, wanted = layouts.temporal_rows(
            drafts.tokens, drafts.step_map, known, lanes.start, self.target.scratch, mask_id
        )
        wanted &= lanes.live[:, None]
        packed, index = self.target.forward(lanes, lanes.starts, rows.only(lanes.live), wanted, None)
        # A position has its logits at its known row or at its mask row.
        place = torch.maximum(index[:, :length], index[:, length:]).clamp(min=0).long()  # [B, L]
        logits = packed[place]
        filters = sampler.filters
        accepted, bonus, tokens, target_ids, prob = kernels.block_verify(
            logits,
            drafts.tokens,
            known,
            drafts.revealed,
            lanes.temperature,
            lanes.top_k if filters[0] else None,
            lanes.top_p if filters[1] else None,
            lanes.seed,
            layouts.span(lanes.start.clamp(min=0), length),
            drafts.drawn_under,
            banned_ids=sampler.banned,
            rule=config.accept,
            **self._coins(drafts),
        )
        columns = (accepted[:, None], bonus[:, None], tokens, target_ids, drafts.tokens, drafts.step_map, prob)
        host = torch.cat([x.double() for x in columns], 1).tolist()
        verdicts = {}
        for lane, start in enumerate(lanes.starts):
            if start < 0:
                continue
            counts, lists = [int(x) for x in host[lane][:2]], host[lane][2:]
            ints = [[int(x) for x in lists[i * length : (i + 1) * length]] for i in range(4)]
            verdict = _settle(*ints, lists[4 * length :], counts[1], drafts.known[lane], config)
            verdict.accepted, verdict.draft_forwards = counts[0], drafts.forwards[lane]
            if "tail" in verdict.origins:
                _judge_tail(verdict, logits[lane], drafts.known[lane], lanes.temperature[lane], sampler.banned)
            if verdict.bonus and counts[1] in self.end_ids and config.end_gate > 0:
                heat = lanes.temperature[lane]
                _gate_end(verdict, logits[lane], drafts.known[lane], heat, sampler.banned, config, self.end_ids)
            verdicts[lane] = verdict
        return verdicts

    def _coins(self, drafts: Drafts) -> dict[str, Tensor]:
        """Uniform variates of `mrs`, from each sequence's own generator."""
        if self.config.accept != "mrs":
            return {}
        lanes = self.lanes
        coin, residual = (
            torch.zeros(shape, dtype=torch.float32, device=lanes.device) for shape in (drafts.tokens.shape, lanes.count)
        )
        for lane, start in enumerate(lanes.starts):
            if start >= 0:
                generator = self.generators[lane]
                coin[lane] = torch.rand(lanes.length, generator=generator, dtype=torch.float32, device=lanes.device)
                residual[lane] = torch.rand((), generator=generator, dtype=torch.float32, device=lanes.device)
        return {"draft_logits": drafts.logits, "coin": coin, "residual": residual}


def _settle(
    tokens: list[int],
    targets: list[int],
    drafts: list[int],
    steps: list[int],
    probs: list[float],
    bonus: int,
    known: int,
    config: GenerationConfig,
) -> Verdict:
    """Applies `config.rejected_tail`; the lists are the block's, position by position."""
    last_step = config.block_steps(len(tokens)) + 1
    stop = tokens.index(-1) if -1 in tokens else len(tokens)
    origins = ["drafted" if step else "undrafted" for step in steps]
    has_bonus = bonus >= 0
    if has_bonus:
        origins[stop - 1] = "bonus"
    if has_bonus and config.rejected_tail == "truncate_no_bonus" and stop - 1 > known:
        stop, has_bonus = stop - 1, False
    elif has_bonus and config.rejected_tail not in ("truncate", "truncate_no_bonus"):
        if config.rejected_tail == "target_argmax_all":
            replaced = [i for i in range(known, len(tokens)) if i != stop - 1 and tokens[i] != targets[i]]
        else:
            replaced = range(stop, len(tokens))
        keeps_draft = config.rejected_tail == "draft_argmax"
        for i in replaced:
            tokens[i] = drafts[i] if keeps_draft and steps[i] else targets[i]
            origins[i] = "tail"
        stop = len(tokens)
    span = slice(known, stop)
    return Verdict(
        tokens=tokens[span],
        steps=[step or last_step for step in steps[span]],
        probs=probs[span],
        logprobs=[math.log(prob) if prob > 0 else -math.inf for prob in probs[span]],
        origins=origins[span],
        drafted=sum(step > 0 for step in steps[known:]),
        accepted=0,
        bonus=int(has_bonus),
    )


def _log_probs(logits: Tensor, temperature: Tensor, banned: Tensor) -> Tensor:
    """[L, V] of what a token's probability is taken of: no filters, temperature 0 counts as 1."""
    x = logits.float() / torch.where(temperature > 0, temperature, 1.0)
    return x.index_fill(1, banned, -torch.inf).log_softmax(1)


def _judge_tail(verdict: Verdict, logits: Tensor, known: int, temperature: Tensor, banned: Tensor) -> None:
    """Puts the target's probability beside each token that a tail policy chose: the op judged others there."""
    chosen = torch.tensor(verdict.tokens, device=logits.device)[:, None]
    logs = _log_probs(logits[known : known + len(chosen)], temperature, banned).gather(1, chosen).squeeze(1)
    for i, (log, prob) in enumerate(zip(logs.tolist(), logs.exp().tolist(), strict=True)):
        if verdict.origins[i] == "tail":
            verdict.probs[i], verdict.logprobs[i] = prob, log


def _gate_end(
    verdict: Verdict,
    logits: Tensor,
    known: int,
    temperature: Tensor,
    banned: Tensor,
    config: GenerationConfig,
    end_ids: tuple[int, ...],
) -> None:
    """Drops a bonus end token that the target gives less than `end_gate`.

    Where it is the only token, or a whole block is kept, the target's best other token takes its place, so that every
    verification makes progress.
    """
    at = verdict.origins.index("bonus")
    if verdict.probs[at] >= config.end_gate:
        return
    if at > 0 and at == len(verdict.tokens) - 1 and config.rejected_tail.startswith("truncate"):
        for column in (verdict.tokens, verdict.steps, verdict.probs, verdict.logprobs, verdict.origins):
            column.pop()
        verdict.bonus = 0
        return
    logs = _log_probs(logits[known + at][None], temperature, banned)[0]
    token = logs.index_fill(0, torch.tensor(end_ids, device=logs.device), -torch.inf).argmax()
    log = logs[token]
    verdict.tokens[at], verdict.probs[at], verdict.logprobs[at] = int(token), float(log.exp()), float(log)
