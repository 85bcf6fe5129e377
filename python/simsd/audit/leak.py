"""The leak test: does what is said of a drafted token depend on that token?"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from simsd.audit.forwards import Alone, Forward, allowed, decode, plain_logits, tolerance, watching
from simsd.audit.report import FAIL, INCONCLUSIVE, PASS, REPORTED, Check, Subject
from simsd.config import GenerationConfig
from simsd.decode.iteration import Shape
from simsd.decode.rows import temporal_rows
from simsd.decode.slots import Slots
from simsd.engine.decoder import Decoder
from simsd.models.loading import LoadedModel
from simsd_kernels import Plan

NAME = "verification logits when the judged token changes"
PER_FORWARD = 3  # positions tried in one forward of exact decoding


@dataclasses.dataclass
class Shifts:
    """Per judged position: the largest change of one of its logits, and whether the argmax changed."""

    moved: list[float] = dataclasses.field(default_factory=list)
    flipped: list[bool] = dataclasses.field(default_factory=list)
    rounding: float = 0.0

    def see(self, before: Tensor, after: Tensor, banned: list[int]) -> None:
        """Logits [n, V] of one position, each row in another context."""
        self.moved.append(float((before.float() - after.float()).abs().max()))
        first, second = (allowed(x, banned).argmax(1) for x in (before, after))
        self.flipped.append(bool((first != second).any()))
        self.rounding = max(self.rounding, tolerance(before))

    def figures(self) -> dict[str, float | int]:
        moved = torch.tensor(self.moved or [0.0])
        return {
            "positions": len(self.moved),
            "max": float(moved.max()),
            "mean": float(moved.mean()),
            "moved": sum(x > 0 for x in self.moved) / max(len(self.moved), 1),
            "flips": sum(self.flipped) / max(len(self.flipped), 1),
        }

    def summary(self) -> str:
        f = self.figures()
        if not f["positions"]:
            return "no drafted position could be judged"
        if f["max"] == 0:
            return f"0 at all of {f['positions']} positions"
        return (
            f"max {f['max']:.3g}, mean {f['mean']:.3g}, {f['moved']:.0%} of {f['positions']} positions moved, "
            f"{f['flips']:.1%} of argmaxes flipped"
        )


def exact_leak(subject: Subject) -> Check:
    """Repeats forwards of real exact decoding with one drafted token changed, wherever a copy or a finished block holds
    it; copies that do not hold it must give its position the same logits, to the last bit."""
    shifts, banned, turn = Shifts(), subject.target.banned_ids, [0]

    def see(slots: Slots, shape: Shape, forward: Forward, plan: Plan) -> Tensor:
        logits = forward(plan)
        moved = []
        for _ in range(PER_FORWARD):
            turn[0] += 1
            changed, judged = change_tokens(plan, shape, logits, banned, turn[0])
            if not judged:
                return logits
            after = forward(plan._replace(tokens=changed))
            moved += [(rows, after[rows]) for rows in judged]
        # The true one again, and last, since finished blocks went to their final slots.
        logits = forward(plan)
        for rows, after in moved:
            shifts.see(logits[rows], after, banned)
        return logits

    config = subject.exact()
    decode(Decoder(subject.target, subject.prompts, subject.draft, config, max_batch=1, parts=watching(see)))
    figures = shifts.figures()
    summary = shifts.summary()
    result = PASS if figures["max"] == 0 else FAIL
    if not shifts.moved:
        result = INCONCLUSIVE
    elif result == FAIL and figures["max"] <= shifts.rounding and groups_rows(subject.target):
        result = INCONCLUSIVE
        summary += "; rounding: experts group rows by count, load with deterministic=True to tell"
    return Check("leak", NAME, "exact", result, summary, figures, shifts.moved)


def change_tokens(
    plan: Plan, shape: Shape, logits: Tensor, banned: list[int], turn: int
) -> tuple[Tensor, list[Tensor]]:
    """Changes one drafted token in every sequence of a plan, to the target's best other token.

    Returns:
        tokens int64 [B, R], and for each sequence that has such a token the rows (int64 [n]) of the logits of its
        position in states that do not hold it. `turn` picks the position.
    """
    batch, _, length = plan.states.shape
    before = shape.pending + shape.lookahead  # blocks of rows before those of states
    tokens = plan.tokens.clone().view(batch, -1, length)
    judged = []
    for slot in range(batch):
        block = plan.block[slot]  # [C]
        shown = (plan.state_revealed[slot][:, None] >> torch.arange(length, device=block.device)) & 1 == 1  # [C, L]
        passed = int(plan.draft_blocks_in_rows[slot])
        places = []
        for k in sorted(set(block[block >= 0].tolist())):
            for i in range(length):
                mine = block == k
                holds, lacks = mine & shown[:, i], mine & ~shown[:, i]
                if (bool(holds.any()) or k < passed) and lacks.any():
                    places.append((k, i, holds, lacks))
        if not places:
            continue
        k, i, holds, lacks = places[turn % len(places)]
        rows = plan.state_rows[slot][lacks][:, i].long()
        finished = shape.pending + k  # where its rows as a finished block are
        drafted = int(plan.states[slot][holds][0, i]) if holds.any() else int(tokens[slot, finished, i])
        other = another(logits[rows[0]], drafted, banned)
        if other is None:
            continue
        tokens[slot, before:, i] = torch.where(holds, other, tokens[slot, before:, i])
        if k < passed:
            tokens[slot, finished, i] = other
        judged.append(rows)
    return tokens.view(batch, -1), judged


def another(logits: Tensor, token: int, banned: list[int]) -> int | None:
    """The best id other than `token`; None where there is none."""
    x = allowed(logits, [*banned, token])
    return int(x.argmax()) if x.max() > -torch.inf else None


def groups_rows(target: LoadedModel) -> bool:
    """Whether a row's rounding may depend on the tokens of the others: experts take their rows together."""
    return bool(getattr(target.model.config, "num_experts", 0)) and not target.deterministic


@dataclasses.dataclass(frozen=True)
class Drafted:
    """A block drafted behind real text: `steps` are 1-based, 0 where known."""

    prefix: list[int]
    tokens: list[int]
    steps: list[int]

    @property
    def known(self) -> int:
        return self.steps.count(0)

    def before(self, step: int, mask_id: int) -> list[int]:
        """The block as the draft had it when it revealed at `step`."""
        return [t if s < step else mask_id for t, s in zip(self.tokens, self.steps, strict=True)]


def drafted_blocks(subject: Subject) -> list[Drafted]:
    """The first blocks behind each prompt and behind what the target says to it, as the draft denoises them."""
    target, draft, length = subject.target, subject.temporal_draft, subject.target.block_length
    count = subject.settings.blocks
    config = GenerationConfig(verify="none", max_new_tokens=count * length, end_token_ids=(), block_length=length)
    contexts = []
    for result in decode(Decoder(target, subject.prompts, config=config, max_batch=subject.settings.batch)):
        text = result.prompt_tokens + result.tokens
        starts = {len(result.prompt_tokens), *range(len(text) // length * length, len(result.prompt_tokens), -length)}
        contexts += [text[:start] for start in sorted(starts)[:count]]
    config = dataclasses.replace(config, max_new_tokens=length)
    blocks = []
    for context, result in zip(
        contexts, decode(Decoder(draft, contexts, config=config, max_batch=subject.settings.batch)), strict=True
    ):
        known = len(context) % length
        start = len(context) - known
        tokens = context[start:] + result.tokens[: length - known]
        blocks.append(Drafted(context[:start], tokens, [0] * known + result.step_map[: length - known]))
    return blocks


class TemporalForward:
    """The verification forward of `temporal` on one drafted block."""

    def __init__(self, target: LoadedModel, blocks: list[Drafted]) -> None:
        longest = max(len(block.prefix) for block in blocks)
        self.target = target
        self.alone = Alone(target, longest + target.block_length, states=2)

    def __call__(self, block: Drafted, tokens: list[int]) -> Tensor:
        """[L, V], the logits that judge each position of `block`, drafted as `tokens`."""
        alone, device, length = self.alone, self.target.device, len(tokens)
        alone.open(block.prefix)
        rows = temporal_rows(
            torch.tensor([tokens], device=device),
            torch.tensor([block.steps], dtype=torch.int32, device=device),
            torch.tensor([block.known], dtype=torch.int32, device=device),
            alone.start,
            alone.runner.scratch,
            self.target.mask_token_id,
            torch.tensor([(block.prefix or [0])[-1]], device=device) if self.target.shift else None,
        )
        index = torch.arange(length, device=device)
        judged = rows.tokens.shape[1] - length + index
        return alone.run(rows, torch.where(index < block.known, index, judged))


def temporal_leak(subject: Subject, blocks: list[Drafted]) -> Check:
    """The same for SimSD's layout: a mask row does not see its own reference token, but later mask rows do, and it sees
    them."""
    shifts, banned = Shifts(), subject.target.banned_ids
    forward = TemporalForward(subject.target, blocks)
    for block in blocks:
        forward(block, block.tokens)  # commits the prefix
        before = forward(block, block.tokens)
        for i, step in enumerate(block.steps):
            other = another(before[i], block.tokens[i], banned) if step else None
            if other is not None:
                after = forward(block, [*block.tokens[:i], other, *block.tokens[i + 1 :]])
                shifts.see(before[i : i + 1], after[i : i + 1], banned)
    result = REPORTED if shifts.moved else INCONCLUSIVE
    return Check("leak", NAME, "temporal", result, shifts.summary(), shifts.figures(), shifts.moved)


def temporal_context(subject: Subject, blocks: list[Drafted]) -> Check:
    """How far temporal's verification logits are from the target's own on what the draft had revealed by then."""
    target, shifts = subject.target, Shifts()
    forward = TemporalForward(target, blocks)
    for block in blocks:
        judged = forward(block, block.tokens)
        steps = sorted({step for step in block.steps if step})
        true = plain_logits(target, block.prefix, [block.before(step, target.mask_token_id) for step in steps])
        for i, step in enumerate(block.steps):
            if step:
                shifts.see(judged[i : i + 1], true[steps.index(step), i][None], target.banned_ids)
    result = REPORTED if shifts.moved else INCONCLUSIVE
    return Check(
        "context", "distance from a forward on the true state", "temporal", result, shifts.summary(), shifts.figures(),
        shifts.moved,
    )  # fmt: skip
