"""Decoding at a chosen acceptance rate and at the real price of drafting, with the decoding loop as it is.

Acceptance belongs to a pair of trained models. Where there is none, `Replay` keeps every forward of the draft model and
puts another proposal in the place of the one that they led to: the text that native decoding gives, with each token
wrong at a given rate. `ScriptedTarget` gives a target of random weights such a text in the first place, whatever
rounding does: after each real forward the script's token gets the largest logit.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from simsd import exact, side, temporal

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


class Replay:
    """While it is entered, the draft model's proposals are `script` with a share `rate` of its tokens wrong.

    In the exact verifier the draft then knows the order of the script and is as sure of each token as the rate allows;
    in the temporal one its own order stays. Greedy decoding only.
    """

    def __init__(self, script: Script, rate: float, vocabulary: int, mask_id: int) -> None:
        self.script, self.rate = script, rate
        self.drafted = script.corrupted(rate, vocabulary, mask_id)

    def __enter__(self) -> Replay:
        self._by_model, self._draft = exact.by_model, temporal.Temporal._draft
        exact.by_model = self.by_model
        temporal.Temporal._draft = lambda loop, known: self.temporal_draft(loop, known)
        return self

    def __exit__(self, *_) -> None:
        exact.by_model, temporal.Temporal._draft = self._by_model, self._draft

    def by_model(self, drafter, lanes, proposal, depths, sampler, times) -> list[int]:
        """`simsd.drafting.by_model`, its blocks replaced afterwards."""
        if proposal.logits is not None:
            raise ValueError("a replay is greedy: the target would draw from the draft's own logits")
        before = list(proposal.depths)
        counts = self._by_model(drafter, lanes, proposal, depths, sampler, times)
        for k in range(max(proposal.depths, default=0)):
            chosen = [lane for lane, depth in enumerate(proposal.depths) if depth > k >= before[lane]]
            if chosen:
                self._replace(lanes, proposal, torch.tensor(chosen, device=lanes.device), k)
        return counts

    def _replace(self, lanes, proposal, at: Tensor, k: int) -> None:
        places = self._places(lanes)[at] + k * lanes.length
        places = places.clamp(max=len(self.drafted) - 1)
        token, rank = self.drafted[places], self.script.rank[places]
        if k == 0:
            token = torch.where(lanes.shown[at], lanes.block(0)[at], token)
        proposal.clean[at, k] = token
        proposal.prob[at, k] = min(1.0 - self.rate, 0.999)
        proposal.log_odds[at, k] = -STEP * rank.float()
        proposal.entropy[at, k] = 0.01 * (1.0 + rank.float())

    @staticmethod
    def _places(lanes) -> Tensor:
        """int64 [B, L], the positions of the current block."""
        return lanes.start.clamp(min=0).long()[:, None] + lanes.index.long()

    def temporal_draft(self, loop, known: list[int]):
        """`Temporal._draft`, what it revealed replaced afterwards."""
        drafts, lanes = self._draft(loop, known), loop.lanes
        places = self._places(lanes).clamp(max=len(self.drafted) - 1)
        fixed = lanes.index < torch.tensor(known, device=lanes.device)[:, None]
        mine = lanes.bits_in(drafts.revealed) & ~fixed
        drafts.tokens = torch.where(mine, self.drafted[places], drafts.tokens)
        return drafts


class ScriptedTarget:
    """While it is entered, greedy decoding with `model` writes `script`, in its order; every forward is a real one, and
    one small kernel more."""

    def __init__(self, model, script: Script) -> None:
        self.model, self.script = model, script
        self.logits = BASE + STEP * (63 - script.rank).to(torch.float32)

    def __enter__(self) -> ScriptedTarget:
        self._run = side.run
        side.run = self.run
        return self

    def __exit__(self, *_) -> None:
        side.run = self._run

    @torch.inference_mode()
    def run(self, model, tokens, positions, *rest) -> Tensor | None:
        """`simsd.models.forward.run`: rest = clock, birth, death, cache, slots[, logits_rows[, packing]]."""
        logits = self._run(model, tokens, positions, *rest)
        if logits is None or model is not self.model:
            return logits
        asked, packing = (*rest[5:], None, None)[:2]
        places = positions if packing is None else packing.pack(positions)
        places = places if asked is None else places.index_select(1, asked)
        places = places.long().clamp(0, len(self.logits) - 1)
        return logits.scatter_(
            2, self.script.tokens[places][..., None], self.logits[places][..., None].to(logits.dtype)
        )
