"""The probability of a text under a block-diffusion model, token by token from the left."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simsd.decode.rows import aligned, scratch_behind
from simsd.errors import SimsdError
from simsd.models.loading import LoadedModel
from simsd.models.runner import ModelRunner
from simsd_kernels import INF

MAX_ROWS, MAX_STATES = 2048, 256  # of a forward: what its layers and its logits take


class Scorer:
    """Scores continuations of contexts.

    The score is the log-probability, in nats, with which the model generates the continuation from the left, one token
    a step (`strategy="sequential"`, `steps=None`, temperature 1, no top-k or top-p):

        log p(x | c) = sum over i of log p(x_i | c, x_1 .. x_{i-1}, masks to the end of x_i's block)

    Blocks are counted from the context's first token, and ids that are never generated have no share of the
    probability, as in decoding. That is a normalised distribution over texts and needs no sampling, unlike the
    Monte-Carlo bound of models that denoise a whole text at once (LLaDA, arXiv 2502.09992, equation 6). Another order
    of revealing is another distribution: the score does not depend on `strategy`.

    All states of a block are rows of one forward, which see the committed blocks and their own state alone. Where a row
    predicts the next position, x_i is told by the row before: at a block's beginning, the last of the block before.

    Args:
        model: whose probability it is; its weights may not change meanwhile.
        block_length: tokens per block; None: the model's own.
    """

    def __init__(self, model: LoadedModel, block_length: int | None = None) -> None:
        self.model, self.block_length = model, block_length or model.block_length
        self._states_at_once = max(min(MAX_ROWS // self.block_length, MAX_STATES), 1)
        self._banned = torch.tensor(model.banned_ids, device=model.device)
        self._runner: ModelRunner | None = None
        self._committed: list[int] = []  # whole blocks whose keys and values the runner has

    @torch.inference_mode()
    def score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Log-probability of the continuation, and whether greedy decoding in that order gives it.

        Raises SimsdError where both together are longer than the model's positions.
        """
        tokens, first, L = [*context, *continuation], len(context), self.block_length
        places = aligned(len(tokens), L)
        if self.model.max_positions is not None and places > self.model.max_positions:
            raise SimsdError(
                f"{len(tokens)} tokens to score, in whole blocks {places}, exceed the {self.model.max_positions} "
                f"positions of {self.model.name}"
            )
        runner = self._runner_for(places)
        self._commit(runner, tokens[: max(len(tokens) - 1, 0) // L * L])
        total, greedy = 0.0, True
        for begin in range(first, len(tokens), self._states_at_once):
            at = range(begin, min(begin + self._states_at_once, len(tokens)))
            logits = self._state_logits(runner, tokens, at)  # [n, V]
            logits[:, self._banned] = -torch.inf
            wanted = torch.tensor(tokens[at.start : at.stop], device=logits.device)
            total += logits.log_softmax(-1).gather(1, wanted[:, None]).double().sum().item()
            greedy = greedy and bool((logits.argmax(-1) == wanted).all())
        return total, greedy

    def _runner_for(self, places: int) -> ModelRunner:
        """One with room for as many committed tokens, and for the rows of a forward behind them."""
        if self._runner is None or self._runner.scratch < places:
            most = max(places, 2 * self._runner.scratch if self._runner else 0)
            scratch = scratch_behind(most, self.model.device)
            self._runner = ModelRunner(self.model, 1, scratch + self._states_at_once * self.block_length, scratch)
            self._committed = []
        return self._runner

    def _commit(self, runner: ModelRunner, tokens: list[int]) -> None:
        """Computes the keys and values of whole blocks, but for those that begin the last text as well."""
        L, device = self.block_length, self.model.device
        same = next((i for i, (a, b) in enumerate(zip(tokens, self._committed, strict=False)) if a != b), None)
        same = min(len(tokens), len(self._committed)) if same is None else same // L * L
        birth, death = self._lifetimes(runner, 1)
        for begin in range(same, len(tokens), self._states_at_once * L):
            part = torch.tensor([tokens[begin : begin + self._states_at_once * L]], device=device)
            positions = torch.arange(begin, begin + part.shape[1], dtype=torch.int32, device=device)[None]
            runner.forward(part, positions, positions, positions // L + 1, birth, death, None)
        self._committed = tokens

    def _state_logits(self, runner: ModelRunner, tokens: list[int], at: range) -> Tensor:
        """Logits [n, V] of the tokens at n positions, each in the state in which it is the next, of the block whose row
        tells of it."""
        n, L, mask, device = len(at), self.block_length, self.model.mask_token_id, self.model.device
        position = torch.tensor(at, device=device)  # [n]
        row = (position - 1).clamp(min=0) if self.model.shift else position  # what tells of it
        rows = (row // L * L)[:, None] + torch.arange(L, device=device)  # [n, L], positions
        padded = torch.tensor([*tokens, *[mask] * L], device=device)
        states = torch.where(rows < position[:, None], padded[rows], mask)
        # Each state lives at a moment of its own, behind the commit of the block before it and before that of its own.
        clock = ((row // L + 1) * (n + 1) - n + torch.arange(n, device=device)).int()  # [n]
        clock = clock.repeat_interleave(L)[None]
        birth, death = self._lifetimes(runner, n + 1)
        slots = torch.arange(runner.scratch, runner.scratch + n * L, dtype=torch.int32, device=device)[None]
        birth[:, runner.scratch : runner.scratch + n * L] = clock
        death[:, runner.scratch : runner.scratch + n * L] = clock
        wanted = torch.arange(n, device=device) * L + row % L
        logits = runner.forward(states.view(1, -1), rows.view(1, -1), slots, clock, birth, death, wanted)
        return logits.float()

    def _lifetimes(self, runner: ModelRunner, unit: int) -> tuple[Tensor, Tensor]:
        """birth and death [1, S] where block b is committed at the moment (b + 1) * unit; scratch is not born."""
        places = torch.arange(runner.kv_slots, dtype=torch.int32, device=self.model.device)[None]
        birth = (places // self.block_length + 1) * unit
        return birth.masked_fill(places >= runner.scratch, INF), torch.full_like(places, INF)
