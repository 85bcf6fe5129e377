"""Decoding at a chosen acceptance rate and at the real price of drafting, with the decoding loop as it is.

Acceptance belongs to a pair of trained models. Where there is none, `Replay` keeps every forward of the draft model and
puts another proposal in the place of the one that they led to: the text that native decoding gives, with each token
wrong at a given rate. `scripted` gives a target of random weights such a text in the first place, whatever rounding
does: after each real forward the script's token gets the largest logit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from simsd.decode.draft import by_model
from simsd.decode.iteration import Parts, run_plan
from simsd.decode.temporal import draft_blocks

STEP = 8.0  # log-odds between positions that are revealed one after the other; exact in bf16 behind BASE
BASE = 1024.0


@dataclasses.dataclass(frozen=True)
class Script:
    """A text by absolute position, the same for every sequence: tokens int64 [N]; rank int64 [N], in 0..63, the order
    in which the positions of a block are revealed."""

    tokens: Tensor
    rank: Tensor

    @classmethod
    def random(cls, count: int, block_length: int, vocabulary: int, device: torch.device, seed: int = 0) -> Script:
        """Tokens at random from the first `vocabulary` ids, an order at random in each block."""
        generator = torch.Generator().manual_seed(seed)
        blocks = -(-count // block_length)
        tokens = torch.randint(0, vocabulary, (blocks * block_length,), generator=generator)
        rank = torch.rand(blocks, block_length, generator=generator).argsort(1).flatten()
        return cls(tokens.to(device), rank.to(device))

    @classmethod
    def recorded(cls, result, block_length: int, device: torch.device) -> Script:
        """What native decoding gave, and in its order; behind its end the text repeats its last token."""
        count = len(result.prompt_tokens) + len(result.tokens)
        room = -count % block_length + 4 * block_length
        tokens = [*result.prompt_tokens, *result.tokens, *result.tokens[-1:] * room]
        rank = [*[0] * len(result.prompt_tokens), *(step - 1 for step in result.step_map), *[0] * room]
        return cls(torch.tensor(tokens, device=device), torch.tensor(rank, device=device).clamp(0, 63))

    def corrupted(self, rate: float, vocabulary: int, mask_id: int, seed: int = 1) -> Tensor:
        """The tokens, each another one with probability `rate`; what is wrong at a rate is wrong at larger ones."""
        chance = torch.rand(len(self.tokens), generator=torch.Generator().manual_seed(seed)).to(self.tokens.device)
        other = (self.tokens + 1) % vocabulary
        other = torch.where(other == mask_id, (other + 1) % vocabulary, other)
        return torch.where(chance < rate, other, self.tokens)


def scripted(script: Script) -> Callable[..., Tensor]:
    """The target's forward (`Parts.forward`) of greedy decoding that writes `script`, in its order; every forward is a
    real one, and a few small kernels more."""
    surest = BASE + STEP * (63 - script.rank).to(torch.float32)

    def forward(target, plan, slots, shape) -> Tensor:
        logits = run_plan(target, plan, slots, shape)
        places = plan.positions.flatten()[plan.logits_index[: len(logits)]].long().clamp(0, len(surest) - 1)
        return logits.scatter_(1, script.tokens[places][:, None], surest[places][:, None].to(logits.dtype))

    return forward


class Replay:
    """Proposals that are `script` with a share `rate` of its tokens wrong, in place of those that the draft model's
    forwards led to: `parts` for a decoder.

    In the exact verifier the draft then knows the order of the script and is as sure of each token as the rate allows;
    in the temporal one its own order stays. Greedy decoding only.
    """

    def __init__(self, script: Script, rate: float, vocabulary: int, mask_id: int) -> None:
        self.script, self.rate = script, rate
        self.drafted = script.corrupted(rate, vocabulary, mask_id)

    def parts(self, **others) -> Parts:
        return Parts(proposer=self.propose, drafter=self.draft, **others)

    def propose(self, slots, commands, draft, shape) -> None:
        """`simsd.decode.draft.by_model`, its blocks replaced afterwards."""
        if shape.noise:
            raise ValueError("a replay is greedy: the target would draw from the draft's own logits")
        before = slots.proposal_depth.clone()
        by_model(slots, commands, draft, shape)
        shown = slots.bits_in(slots.revealed)
        for k in range(shape.draft_blocks):
            places = self._places(slots, k)
            token, rank = self.drafted[places], self.script.rank[places]
            new = ((before <= k) & (slots.proposal_depth > k))[:, None]
            if k == 0:
                new = new & ~shown
            for mine, value in (
                (slots.draft_tokens, token),
                (slots.draft_prob, min(1.0 - self.rate, 0.999)),
                (slots.draft_log_odds, -STEP * rank.float()),
                (slots.draft_entropy, 0.01 * (1.0 + rank.float())),
            ):
                mine[:, k] = torch.where(new, value, mine[:, k])

    def draft(self, slots, commands, draft, shape):
        """`simsd.decode.temporal.draft_blocks`, what it revealed replaced afterwards."""
        drafts = draft_blocks(slots, commands, draft, shape)
        mine = drafts.step_map > 0
        return dataclasses.replace(
            drafts, tokens=torch.where(mine, self.drafted[self._places(slots, 0)], drafts.tokens)
        )

    def _places(self, slots, block: int) -> Tensor:
        """int64 [B, L], the positions of a block, counted from the current one."""
        first = slots.start.clamp(min=0) + block * slots.length
        return slots.span(first).long().clamp(max=len(self.drafted) - 1)
