"""Native decoding, and the exact verifier, which is native decoding several steps at a time.

One iteration: draft; plan which partial reveals of the block the target should see; one target forward over all of them
(unrolled layout: each copy sees the committed prefix and itself); walk the target's own path through them. Without a
draft the plan is the current state alone, and the walk is one native denoising step.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

import simsd_kernels as kernels
from simsd import layouts
from simsd.ambient import undisturbed
from simsd.config import GenerationConfig
from simsd.drafting import Proposal, Sampler, by_model, by_target
from simsd.lanes import Lanes
from simsd.models.attention import unchecked
from simsd.policy import Policy, Way
from simsd.side import Side
from simsd.stopwatch import Stopwatch

DEFAULT_ROWS = 128  # rows that drafted states of one lane take at most where max_rows does not say
ORIGINS = ("known", "denoised", "drafted")


def copies_needed(config: GenerationConfig, block_length: int) -> int:
    """Copies of a block in one forward, the current state included."""
    if config.verify == "none":
        return 1
    rows = DEFAULT_ROWS if config.max_rows is None else config.max_rows
    return min(1 + rows // block_length, layouts.STRIDE // 4)


@dataclasses.dataclass
class Step:
    """What one iteration did in one lane.

    blocks: finished blocks, each a (tokens, steps, probs, origins) of L; provisional: the block on its way, None where
    masked; copies: blocks that the target saw, states and finished ones; the rest are counts.
    """

    blocks: list[tuple[list[int], list[int], list[float], list[str]]]
    provisional: list[int | None]
    drafted: int
    accepted: int
    copies: int
    draft_forwards: int
    finite: bool


class Exact:
    def __init__(
        self, lanes: Lanes, target: Side, draft: Side | None, sampler: Sampler, config: GenerationConfig, policy: Policy
    ) -> None:
        self.lanes, self.target, self.draft = lanes, target, draft
        self.sampler, self.config, self.policy = sampler, config, policy
        self.copies = copies_needed(config, lanes.length)
        device, dtype = lanes.device, target.model.dtype
        self._plan = unchecked(kernels.plan_block, device, dtype)
        self._verify = unchecked(kernels.block_verify_graph, device, dtype, "block_verify.graph")
        self.samples = config.temperature > 0
        # For the next self-draft: the target's logits for the copy that each lane's walk ended on, and how many
        # positions of the block are masked since (0: the walk did not end inside a block).
        self.last: tuple[Tensor, Tensor] | None = None
        self.last_copy = [-1] * lanes.count
        self.masked = [0] * lanes.count

    def open(self, lane: int) -> None:
        self.masked[lane] = 0
        self.policy.open(lane)

    @torch.inference_mode()
    @undisturbed()
    def step(self) -> dict[int, Step]:
        """One target forward for every lane in use; the steps taken, by lane."""
        lanes, policy = self.lanes, self.policy
        left = [
            (end - start) // lanes.length if start >= 0 else 0
            for start, end in zip(lanes.starts, lanes.ends, strict=True)
        ]
        proposal = self._propose(policy.choose(left, self.masked, self.draft is not None))

        watch = Stopwatch(lanes.device)
        drafting = any(proposal.depths)
        planned = self._plan(
            lanes.block(0),
            lanes.revealed,
            lanes.start,
            lanes.step,
            lanes.blocks_left,
            proposal.clean,
            proposal.depth,
            proposal.prob,
            proposal.log_odds,
            proposal.entropy,
            torch.tensor(policy.trust(), dtype=torch.float32, device=lanes.device),
            proposal.power,
            *self._noise(proposal),
            schedule=self.sampler.schedule,
            strategy=self.sampler.strategy,
            threshold=self.sampler.bound,
            floor=policy.floor() if drafting else 0.0,
            mask_id=self.target.model.mask_token_id,
            max_copies=self.copies if drafting else 1,
            max_rows=self._max_rows(),
            scratch=self.target.scratch,
            slots=self.target.slots,
            stride=layouts.STRIDE,
        )
        plan = kernels.Plan(*planned)
        logits, index = self._forward(plan, proposal.clean.shape[1])
        walked = self._verify(
            *(logits, index, plan.states, plan.revealed, plan.block, proposal.clean, plan.cleaned, proposal.depth),
            *(lanes.start, lanes.step, lanes.step_map, lanes.prob, lanes.origin, lanes.temperature),
            *(lanes.top_k if self.sampler.filters[0] else None, lanes.top_p if self.sampler.filters[1] else None),
            *(lanes.seed, self.sampler.banned),
            schedule=self.sampler.schedule,
            strategy=self.sampler.strategy,
            threshold=self.sampler.bound,
        )
        walk = kernels.Walk(*walked)
        lanes.advance(walk)
        self.last = logits, index
        steps = self._read(walk, plan, proposal)
        watch.stop()
        # The host has read the iteration's result: none of these times makes it wait.
        for rows, drafted in self.draft_times:
            policy.draft.see(rows, drafted.seconds())
        policy.target.see(self.target.rows, watch.seconds())
        return steps

    def _propose(self, ways: list[Way]) -> Proposal:
        """Drafts in the ways chosen."""
        lanes = self.lanes
        own = [lane for lane, way in enumerate(ways) if way.kind == "self"]
        depths = [way.depth for way in ways]
        blocks = max(depths) or int(bool(own))
        model = self.target.model
        vocabulary = model.vocab_size if self.samples and blocks else None
        proposal = Proposal.empty(lanes, blocks, vocabulary, model.dtype)
        if own:
            logits, index = self.last
            at = torch.tensor(own, device=lanes.device)
            rows = index[at, torch.tensor([self.last_copy[lane] for lane in own], device=lanes.device)]  # [n, L]
            by_target(
                lanes, own, logits[rows.clamp(min=0).flatten().long()], proposal, self.sampler, model.mask_token_id
            )
        self.draft_forwards, self.draft_times = [0] * lanes.count, []
        if any(depths):
            self.draft_forwards = by_model(self.draft, lanes, proposal, depths, self.sampler, self.draft_times)
        return proposal

    def _noise(self, proposal: Proposal) -> tuple[Tensor | None, ...]:
        if proposal.logits is None:
            return (None,) * 6
        lanes, sampler = self.lanes, self.sampler
        return proposal.logits, lanes.temperature, lanes.top_k, lanes.top_p, lanes.seed, sampler.banned

    def _max_rows(self) -> int:
        return DEFAULT_ROWS * self.policy.active if self.config.max_rows is None else self.config.max_rows

    def _forward(self, plan: kernels.Plan, ahead: int) -> tuple[Tensor, Tensor]:
        """Logits [N, V] of the masked positions of every copy, and their rows, int32 [B, C, L]."""
        lanes = self.lanes
        masked = ~lanes.bits_in(plan.revealed)  # [B, C, L]
        wanted = (masked & (plan.block >= 0)[:, :, None]).flatten(1)
        if ahead:
            wanted = torch.nn.functional.pad(wanted, (ahead * lanes.length, 0))
        rows = layouts.Rows(plan.tokens, plan.positions, plan.slots, plan.clock, plan.clock, plan.clock)
        logits, index = self.target.forward(lanes, lanes.starts, rows, wanted, (plan.birth, plan.death))
        return logits, index[:, ahead * lanes.length :].unflatten(1, (-1, lanes.length)).contiguous()

    def _read(self, walk: kernels.Walk, plan: kernels.Plan, proposal: Proposal) -> dict[int, Step]:
        """The iteration's one read by the host."""
        lanes, length = self.lanes, self.lanes.length
        copies = (plan.block >= 0).sum(1, keepdim=True) + plan.cleaned[:, None]
        columns = (walk.progress, copies, lanes.shown, walk.tokens, walk.step_map, walk.prob, walk.origin)
        host = torch.cat([*(x.flatten(1).double() for x in columns), proposal.clean.flatten(1).double()], 1).tolist()
        blocks = walk.tokens.shape[1]
        steps = {}
        self.last_copy = [-1] * lanes.count
        for lane, start in enumerate(lanes.starts):
            if start < 0:
                continue
            numbers, rest = [int(x) for x in host[lane][:8]], host[lane][8:]
            finished, committed, taken, last, step, judged, accepted, copied = numbers
            shown, rest = rest[:length], rest[length:]

            def column(n: int, k: int, rest=rest) -> list[float]:
                first = (n * blocks + k) * length
                return rest[first : first + length]

            tokens = [[int(x) for x in column(0, k)] for k in range(finished + 1)]
            clean = rest[4 * blocks * length :]
            same = 0
            while (
                same < min(finished, proposal.depths[lane])
                and tokens[same] == clean[same * length : (same + 1) * length]
            ):
                same += 1
            lanes.starts[lane] += finished * length
            self.target.committed[lane] = start + committed * length
            if self.draft is not None:
                self.draft.committed[lane] = min(self.draft.committed[lane], start + same * length)
            self.masked[lane] = length - int(sum(shown)) if step > 0 else 0
            self.last_copy[lane] = last
            self.policy.see(lane, judged, accepted, taken - 1, (copied - 1) * length, self.draft_forwards[lane])
            steps[lane] = Step(
                blocks=[
                    (tokens[k], [int(x) for x in column(1, k)], column(2, k), [ORIGINS[int(x)] for x in column(3, k)])
                    for k in range(finished)
                ],
                provisional=[t if s else None for t, s in zip(tokens[finished], shown, strict=True)],
                drafted=judged,
                accepted=accepted,
                copies=copied,
                draft_forwards=self.draft_forwards[lane],
                finite=all(p > 0 for k in range(finished + 1) for p in column(2, k)),
            )
        return steps
