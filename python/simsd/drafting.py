"""What the target is asked to verify: proposals for the current block and those behind it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import simsd_kernels as kernels
from simsd import layouts
from simsd.config import GenerationConfig
from simsd.lanes import Lanes
from simsd.models.attention import unchecked
from simsd.side import Side
from simsd.stopwatch import Stopwatch

# How far log-odds tell the target's order: those of another model hardly (another context, too), its own well.
MODEL_POWER, OWN_POWER = 0.25, 1.0
BEHIND = 1e-3  # log-odds or nats between a drafted position and those that the draft revealed before it


class Sampler:
    """`sample_logits` and `reveal` with one generation's settings."""

    def __init__(
        self, config: GenerationConfig, block_length: int, banned: Tensor, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._sample = unchecked(kernels.sample_logits, device, dtype)
        self._reveal = unchecked(kernels.reveal, device, dtype)
        self.config, self.banned = config, banned
        self.strategy = config.strategy
        self.bound = config.entropy_bound if config.strategy == "entropy_bounded" else config.threshold
        self.schedule = torch.tensor(config.reveal_counts(block_length), dtype=torch.int32, device=device)
        self.steps = len(self.schedule)
        # None, not neutral values: without filters every backend serves the ops.
        self.filters = config.top_k > 0, config.top_p < 1
        # The leftmost rule reveals in one order only, so its noise needs no key but the position (full coupling).
        self.keyed_by_set = config.strategy != "sequential"

    def key(self, revealed: Tensor) -> Tensor:
        """The revealed set int64 [B] as the noise sees it: a copy, since `reveal` updates the set in place."""
        return revealed.clone() if self.keyed_by_set else torch.zeros_like(revealed)

    def draw(self, lanes: Lanes, chosen: Tensor, logits: Tensor, start: Tensor, key: Tensor) -> tuple[Tensor, ...]:
        """logits [n * L, V] of the n blocks at `start` in the lanes `chosen` (int64 [n]), keys int64 [n]
        -> token, prob, log_odds, entropy, each [n, L]."""
        length = lanes.length

        def rows(value: Tensor) -> Tensor:
            return value[chosen].repeat_interleave(length)

        settings = (rows(x) for x in (lanes.temperature, lanes.top_k, lanes.top_p, lanes.seed))
        positions = layouts.span(start, length).flatten()
        out = self._sample(logits, *settings, positions, key.repeat_interleave(length), self.banned)
        return tuple(x.view(-1, length) for x in out[:4])

    def reveal(self, tokens, revealed, step_map, token, prob, log_odds, entropy, step) -> Tensor:
        return self._reveal(
            *(tokens, revealed, step_map, token, prob, log_odds, entropy, step),
            *(self.schedule, self.strategy, self.bound),
        )


@dataclasses.dataclass
class Proposal:
    """Drafted blocks of a batch, K at most: the current block and those behind it.

    Attributes:
        clean: int64 [B, K, L], the blocks as the draft finishes them.
        depth: int32 [B], how many of them are proposed.
        prob, log_odds, entropy: float32 [B, K, L], the draft's statistics of `clean`.
        logits: [B, K, L, V], what tokens are drawn from; None at temperature 0.
        power: float32 [B, K], how far the statistics tell the order in which the target reveals (`config.order_power`).
        depths: `depth` on the host.
    """

    clean: Tensor
    depth: Tensor
    prob: Tensor
    log_odds: Tensor
    entropy: Tensor
    logits: Tensor | None
    power: Tensor
    depths: list[int]

    @classmethod
    def empty(cls, lanes: Lanes, blocks: int, vocabulary: int | None, dtype: torch.dtype) -> Proposal:
        """No proposals, room for `blocks`; `vocabulary`: of the logits, None for none."""
        shape = (lanes.count, blocks, lanes.length)

        def statistic() -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=lanes.device)

        logits = None
        if vocabulary is not None:
            logits = torch.zeros((*shape, vocabulary), dtype=dtype, device=lanes.device)
        return cls(
            clean=torch.zeros(shape, dtype=torch.int64, device=lanes.device),
            depth=torch.zeros(lanes.count, dtype=torch.int32, device=lanes.device),
            prob=statistic(),
            log_odds=statistic(),
            entropy=statistic(),
            logits=logits,
            power=torch.zeros(shape[:2], dtype=torch.float32, device=lanes.device),
            depths=[0] * lanes.count,
        )

    def fill(
        self, lanes: Lanes, chosen: list[int], k: int, logits: Tensor, sampler: Sampler, base: tuple, power: float
    ) -> None:
        """Proposes block number k in the lanes `chosen` from logits [n * L, V].

        `base`: tokens [n, L], revealed [n], step [n] of that block, which the draft finishes on these logits alone.
        What it has revealed in the block before came with its own call of `keep`. `power`: where the config has none.
        """
        tokens, revealed, step = base
        at = torch.tensor(chosen, device=lanes.device)
        start = lanes.start[at] + k * lanes.length
        shown = lanes.bits_in(revealed)
        if self.logits is None:
            token, *statistics = sampler.draw(lanes, at, logits, start, sampler.key(revealed))
            self.clean[at, k] = torch.where(shown, tokens, token)
        else:
            statistics = []  # `plan_block` draws anew in every state
            self.clean[at, k] = _finish(lanes, at, logits, start, sampler, tokens, revealed, step)
        self.keep(at, k, ~shown, statistics, logits)
        self.depth[at] = k + 1
        self.power[at, k] = power if sampler.config.order_power is None else sampler.config.order_power
        for lane in chosen:
            self.depths[lane] = k + 1

    def keep(self, at: Tensor, k: int, where: Tensor, statistics: list[Tensor], logits: Tensor) -> None:
        """Statistics (each [n, L]) and logits [n * L, V] of block k, at the positions `where` (bool [n, L])."""
        for mine, new in zip((self.prob, self.log_odds, self.entropy), statistics, strict=False):
            mine[at, k] = torch.where(where, new, mine[at, k])
        if self.logits is not None:
            new = logits.view(*where.shape, -1)
            self.logits[at, k] = torch.where(where[:, :, None], new, self.logits[at, k])

    def order(self, at: Tensor, k: int, stage: Tensor) -> None:
        """Makes positions of a later `stage` (int [n, L]) of the draft rank behind those of an earlier one: statistics
        of different contexts do not compare."""
        log_odds, entropy = self.log_odds[at, k], self.entropy[at, k]
        for now in range(1, int(stage.max()) + 1):
            before, here = stage < now, stage == now
            lowest = torch.where(before, log_odds, torch.inf).amin(1, keepdim=True) - BEHIND
            highest = torch.where(before, entropy, -torch.inf).amax(1, keepdim=True) + BEHIND
            log_odds = torch.where(here, log_odds.minimum(lowest), log_odds)
            entropy = torch.where(here, entropy.maximum(highest), entropy)
        self.log_odds[at, k], self.entropy[at, k] = log_odds, entropy


def _finish(
    lanes: Lanes, at: Tensor, logits: Tensor, start: Tensor, sampler: Sampler, tokens: Tensor, revealed: Tensor, step
) -> Tensor:
    """The block [n, L] after the rest of the sampler's own steps, every one on the same logits: with noise, what a
    position draws depends on what is revealed before it."""
    tokens, revealed = tokens.clone(), revealed.clone()
    step_map = torch.zeros_like(tokens, dtype=torch.int32)
    for n in range(sampler.steps):
        drawn = sampler.draw(lanes, at, logits, start, sampler.key(revealed))
        sampler.reveal(tokens, revealed, step_map, *drawn, step + n)
    return tokens


def by_model(
    side: Side,
    lanes: Lanes,
    proposal: Proposal,
    depths: list[int],
    sampler: Sampler,
    times: list[tuple[int, Stopwatch]],
) -> list[int]:
    """Drafts the first depths[b] blocks of each lane with a model, as far as they are not proposed already,
    `config.draft_steps` forwards per block.

    Behind the first block the model sees the proposed ones, whose rows ride along. Appends the rows and the time of
    each forward to `times`; returns the forwards that each lane took part in.
    """
    mask_id = side.model.mask_token_id
    forwards = sampler.config.draft_steps or 1
    counts = [0] * lanes.count
    for k in range(max(depths, default=0)):
        chosen = [lane for lane, depth in enumerate(depths) if depth > k >= proposal.depths[lane]]
        if not chosen:
            continue
        at = torch.tensor(chosen, device=lanes.device)
        live = torch.zeros(lanes.count, dtype=torch.bool, device=lanes.device).index_fill_(0, at, True)
        start = lanes.start + k * lanes.length
        if k == 0:
            tokens, revealed, step = lanes.block(mask_id), lanes.revealed.clone(), lanes.step.clone()
        else:
            tokens = torch.full((lanes.count, lanes.length), mask_id, device=lanes.device)
            revealed, step = torch.zeros_like(lanes.revealed), torch.zeros_like(lanes.step)
            _write(lanes, at, k - 1, proposal.clean)
        ends = [s + k * lanes.length if lane in chosen else -1 for lane, s in enumerate(lanes.starts)]
        wanted = live[:, None].expand(-1, lanes.length)
        stage = torch.full((len(chosen), lanes.length), forwards - 1, device=lanes.device)
        for n in range(forwards):
            watch = Stopwatch(lanes.device)
            rows = layouts.state_rows(tokens, start, side.scratch).only(live)
            logits, index = side.forward(lanes, ends, rows, wanted, None)
            logits = logits[index[at].flatten().long()]
            watch.stop()
            times.append((side.rows, watch))
            for lane in chosen:
                counts[lane] += 1
            if n == forwards - 1:
                break
            part = tokens[at], revealed[at]
            drawn = sampler.draw(lanes, at, logits, start[at], sampler.key(part[1]))
            newly = sampler.reveal(*part, torch.zeros_like(part[0], dtype=torch.int32), *drawn, step[at])
            shown = lanes.bits_in(newly)
            proposal.keep(at, k, shown, drawn[1:], logits)
            stage = torch.where(shown, n, stage)
            tokens[at], revealed[at] = part
            step = step + live
            if bool(lanes.bits_in(revealed[at]).all()):
                break
        proposal.fill(lanes, chosen, k, logits, sampler, (tokens[at], revealed[at], step[at]), MODEL_POWER)
        if forwards > 1:
            proposal.order(at, k, stage)
    return counts


def by_target(
    lanes: Lanes, chosen: list[int], logits: Tensor, proposal: Proposal, sampler: Sampler, mask_id: int
) -> None:
    """Self-draft: logits [n * L, V] that the target gave for an earlier state of the current block propose its rest."""
    at = torch.tensor(chosen, device=lanes.device)
    base = lanes.block(mask_id)[at], lanes.revealed[at], lanes.step[at]
    proposal.fill(lanes, chosen, 0, logits, sampler, base, OWN_POWER)


def _write(lanes: Lanes, at: Tensor, k: int, clean: Tensor) -> None:
    """Drafted block k into the text behind the committed one, where the next block's forward finds it."""
    places = lanes.start[at].long()[:, None] + k * lanes.length + lanes.index.long()
    lanes.text[at[:, None], places] = clean[at, k]
