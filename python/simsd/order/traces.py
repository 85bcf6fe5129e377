"""Traces of native decoding: what the target drew in every state of every block, and what it revealed next."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import simsd_kernels as kernels
from simsd.decode.draft import run_plan
from simsd.decode.iteration import Parts, Shape
from simsd.decode.slots import Slots
from simsd.engine.decoder import Decoder
from simsd.engine.pair import sub_blocks
from simsd.errors import SimsdError, one_line
from simsd.models.attention import unchecked
from simsd.models.loading import LoadedModel
from simsd.models.runner import ModelRunner

KEY = "simsd_traces"  # of the metadata in a file
STRATEGY = "low_confidence_static"  # the target's log-odds rank positions, one is revealed at each step


@dataclasses.dataclass(frozen=True)
class Traces:
    """N blocks of L positions, each decoded in at most L steps that reveal one position.

    Attributes:
        prompt: int64 [N], the number of the prompt.
        start: int64 [N], where the block begins in the text.
        order: int64 [N, L], the position that each step revealed; -1 behind the last step. Positions that no step
            revealed were known: the end of the prompt.
        sub_block: int64 [N, L], the sub-block of each position, from the left: the leftmost one that has any masked is
            revealed first.
        tokens int32, prob, log_odds, entropy float32 [N, L, L]: what the target drew at each step (the first L) at each
            position, as `simsd_kernels.sample_logits` gives it; 0 where nothing was masked.
    """

    prompt: Tensor
    start: Tensor
    order: Tensor
    sub_block: Tensor
    tokens: Tensor
    prob: Tensor
    log_odds: Tensor
    entropy: Tensor

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def block_length(self) -> int:
        return self.order.shape[1]

    @property
    def states(self) -> int:
        """How many states of blocks there are."""
        return int((self.order >= 0).sum())

    @property
    def rank(self) -> Tensor:
        """int64 [N, L]: the step that revealed each position; -1 where it was known."""
        rank = torch.full_like(self.order, -1)
        block, step = (self.order >= 0).nonzero(as_tuple=True)
        rank[block, self.order[block, step]] = step
        return rank

    @property
    def final(self) -> Tensor:
        """int32 [N, L]: the token that each position was revealed with; 0 where it was known."""
        return self.tokens.gather(1, self.rank.clamp(min=0)[:, None]).squeeze(1)

    def of_blocks(self, chosen: Tensor) -> Traces:
        """Those of some blocks: a mask or indices."""
        return Traces(**{name: values[chosen] for name, values in vars(self).items()})

    def save(self, file: Path, about: dict[str, Any]) -> None:
        """Writes them with plain values `about` them."""
        save_file(vars(self), file, metadata={KEY: json.dumps(about)})

    @classmethod
    def load(cls, file: Path) -> tuple[Traces, dict[str, Any]]:
        """What `save` wrote. Raises SimsdError where that cannot be read."""
        try:
            with safe_open(file, "pt") as opened:
                traces = cls(**{name: opened.get_tensor(name) for name in opened.keys()})
                return traces, json.loads(opened.metadata()[KEY])
        except (SafetensorError, OSError, TypeError, ValueError, KeyError) as error:
            raise SimsdError(f"{file} cannot be read ({one_line(error)}): remove it, to record traces anew") from error


def record_traces(
    target: LoadedModel,
    prompts: Sequence[list[int]],
    *,
    block_length: int | None = None,
    max_new_tokens: int = 256,
    max_batch: int = 16,
    temperature: float = 0.0,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> Traces:
    """Decodes prompts natively, one token a step, and keeps every state on the way.

    Args:
        prompts: token ids, no prompt twice.
        block_length: None: the target's own. max_batch: prompts at a time. temperature, seed: as `SamplingParams`.
        advance: called as each prompt is done.

    Raises:
        SimsdError: as `simsd.Decoder`.
    """
    recorder = _Recorder(prompts)
    decoder = Decoder(
        target,
        [*prompts],
        # Packed on every device: an iteration that the recorder looks into cannot be a captured one.
        parts=Parts(forward=recorder.forward, packed=True),
        verify="none",
        strategy=STRATEGY,
        block_length=block_length,
        max_new_tokens=max_new_tokens,
        max_batch=max_batch,
        temperature=temperature,
        seed=seed,
        prefix_cache=False,
    )
    for update in decoder:
        if update.result is not None:
            advance()
    return recorder.traces(sub_blocks(target, decoder.config, decoder.block_length))


class _Recorder:
    """Looks at what the target draws from its logits in the current state of each slot."""

    def __init__(self, prompts: Sequence[list[int]]) -> None:
        self._numbers = {tuple(prompt): number for number, prompt in enumerate(prompts)}
        self._occupants: dict[int, tuple[int, int]] = {}  # of a slot: its epoch, and the number of its prompt
        self._seen: list[tuple[Tensor, ...]] = []

    def forward(self, model: ModelRunner, plan: kernels.Plan, slots: Slots, shape: Shape) -> Tensor:
        logits = run_plan(model, plan, slots, shape)
        rows = plan.state_rows[:, 0]  # [B, L], of the current state
        live = (rows >= 0).any(1).nonzero().squeeze(1)
        if len(live):
            prompt = torch.tensor([self._prompt_in(slot, slots) for slot in live.tolist()])
            where = slots.start[live], slots.revealed[live]
            self._seen.append((prompt, *(x.cpu() for x in (*where, *self._drawn(logits, rows, live, slots, shape)))))
        return logits

    def _drawn(self, logits: Tensor, rows: Tensor, live: Tensor, slots: Slots, shape: Shape) -> list[Tensor]:
        rows, length = rows[live], slots.length
        settings = slots.temperature, slots.top_k, slots.top_p, slots.seed
        out = unchecked(kernels.sample_logits, slots.device, logits.dtype)(
            logits[rows.clamp(min=0).flatten()],
            *(x[live].repeat_interleave(length) for x in settings),
            slots.span(slots.start)[live].flatten(),
            slots.revealed[live].repeat_interleave(length),
            slots.banned(shape.allowed_ids),
        )
        token, prob, log_odds, entropy = (torch.where(rows >= 0, x.view(-1, length), 0) for x in out[:4])
        return [token.int(), prob, log_odds, entropy]

    def _prompt_in(self, slot: int, slots: Slots) -> int:
        epoch = int(slots.request_epoch[slot])
        if self._occupants.get(slot, (None,))[0] != epoch:
            prompt = slots.text[slot, : int(slots.prompt_len[slot])].tolist()
            self._occupants[slot] = epoch, self._numbers[tuple(prompt)]
        return self._occupants[slot][1]

    def traces(self, sub_blocks: list[int]) -> Traces:
        """The blocks that were decoded to their end; they consist of sub-blocks of these lengths."""
        length = sum(sub_blocks)
        full = (1 << length) - 1
        empty = (torch.zeros(0, dtype=torch.int64),) * 3 + (torch.zeros(0, length),) * 4
        prompt, start, revealed, *drawn = (torch.cat(column) for column in zip(*(self._seen or [empty]), strict=True))
        rows: dict[tuple[int, int], dict[int, int]] = {}  # of a prompt and a start: by the set that is revealed
        for row, (*block, state) in enumerate(zip(prompt.tolist(), start.tolist(), revealed.tolist(), strict=True)):
            rows.setdefault(tuple(block), {})[state & full] = row
        blocks, orders, steps = [], [], []
        for block in sorted(rows):
            states = sorted(rows[block], key=int.bit_count)
            if states[-1].bit_count() == length - 1:  # else a text was left in it
                padding = [-1] * (length - len(states))
                newly = (before ^ after for before, after in itertools.pairwise([*states, full]))
                blocks.append(block)
                orders.append([bit.bit_length() - 1 for bit in newly] + padding)
                steps.append([rows[block][state] for state in states] + padding)
        at, order = (torch.tensor(x, dtype=torch.int64).view(-1, length) for x in (steps, orders))
        padding = (at < 0)[:, :, None]
        statistics = (x[at.clamp(min=0)].masked_fill(padding, 0) for x in drawn)
        where = torch.tensor(blocks, dtype=torch.int64).view(-1, 2).unbind(1)
        number = torch.arange(len(sub_blocks)).repeat_interleave(torch.tensor(sub_blocks))
        return Traces(*(x.contiguous() for x in where), order, number.repeat(len(order), 1), *statistics)
