"""Trains an order head on traces: what does native decoding reveal next, and which tokens stay?"""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simsd.errors import SimsdError, one_line
from simsd.order.head import OrderHead, bounded
from simsd.order.traces import Traces

BATCH, LEARNING_RATE, WEIGHT_DECAY, WARMUP_STEPS = 64, 3e-3, 0.01, 50
CHECKPOINT_STEPS = 100  # from one look at the held-out prompts to the next
JUDGED_BY = 1000  # of their states, at most
FADING = 0.9  # of a loss with each further step from the state that was seen
TOKENS = 0.3  # weight of the loss of which tokens stay
HELD_OUT = 0.1  # of the prompts
STALENESS = 4  # most reveals since the state that was seen that accuracies are told of


class Examples(NamedTuple):
    """States of blocks, seen by the target, [n, L] each: what it drew there; the positions that native decoding
    reveals from there on, in its order (-1 behind the last); in how many steps each position is revealed (negative: it
    is); its sub-block; and whether the token drawn is the one that it will be."""

    prob: Tensor
    log_odds: Tensor
    entropy: Tensor
    future: Tensor
    wait: Tensor
    sub_block: Tensor
    stays: Tensor

    def masked_later(self) -> Tensor:
        """bool [n, L, L - 1], of positions after 1, 2, ... L - 1 further reveals; none where the block is done."""
        return self.wait[:, :, None] >= torch.arange(1, self.wait.shape[1])

    def open_later(self) -> Tensor:
        """Those of `masked_later` that may be revealed next."""
        sub_block = self.sub_block[:, :, None]
        masked = self.masked_later()
        return masked & (sub_block == sub_block.masked_fill(~masked, self.wait.shape[1]).amin(1, keepdim=True))


class Accuracy(NamedTuple):
    """How often what is revealed next is told, by the head and by the log-odds themselves, `staleness` reveals after
    the state that was seen; of so many `cases`."""

    staleness: int
    head: float
    rule: float
    cases: int


def split(traces: Traces, seed: int) -> tuple[Traces, Traces]:
    """Traces to train on, and those of a tenth of the prompts (one at least) to judge by.

    Raises SimsdError where one of the two has nothing to tell: no block of two steps.
    """
    prompts = sorted(set(traces.prompt.tolist()))
    count = min(max(1, round(HELD_OUT * len(prompts))), len(prompts))
    held_out = random.Random(seed).sample(prompts, count)
    is_held_out = torch.isin(traces.prompt, torch.tensor(held_out))
    parts = traces.of_blocks(~is_held_out), traces.of_blocks(is_held_out)
    if not all(len(_places(part)) for part in parts):
        raise SimsdError("no block took two steps: give more prompts, or let their texts be longer")
    return parts


def _places(traces: Traces) -> Tensor:
    """int64 [., 2]: block and step of the states from which two steps or more are left."""
    return (traces.order[:, 1:] >= 0).nonzero()


def examples_at(traces: Traces, rank: Tensor, final: Tensor, places: Tensor) -> Examples:
    """The states at (block, step) [n, 2]; rank, final: those of the traces."""
    block, step = places.unbind(1)
    ahead = step[:, None] + torch.arange(traces.block_length)
    future = traces.order[block].gather(1, ahead.clamp(max=traces.block_length - 1))
    future = future.masked_fill(ahead >= traces.block_length, -1)
    statistics = bounded(traces.prob[block, step], traces.log_odds[block, step], traces.entropy[block, step])
    stays = traces.tokens[block, step] == final[block]
    return Examples(*statistics, future, rank[block] - step[:, None], traces.sub_block[block], stays)


def later_log_odds(head: OrderHead, examples: Examples) -> Tensor:
    """[n, L, L - 1]: what the head makes of each position's log-odds after 1, 2, ... L - 1 further reveals."""
    shift, pair = head(examples.wait < 0, examples.prob, examples.log_odds, examples.entropy)
    by = examples.future[:, None, :-1]
    changes = pair.gather(2, by.clamp(min=0).expand(-1, pair.shape[1], -1)).masked_fill(by < 0, 0)
    return (examples.log_odds + shift)[:, :, None] + changes.cumsum(2)


def loss(head: OrderHead, examples: Examples) -> Tensor:
    """Cross-entropy of what is revealed next plus that of which tokens stay, in the states that native decoding comes
    to, later ones for less."""
    later, masked = later_log_odds(head, examples), examples.masked_later()
    weight = FADING ** torch.arange(later.shape[2])
    following = examples.future[:, 1:]
    scores = (head.sharpness * later).masked_fill(~examples.open_later(), -torch.inf)
    scores = scores.masked_fill((following < 0)[:, None], 0)  # no NaN where a block is done
    order = F.cross_entropy(scores, following, ignore_index=-1, reduction="none")
    stays = examples.stays[:, :, None].expand_as(later).float()
    tokens = F.binary_cross_entropy_with_logits(later, stays, reduction="none")
    of_states, of_tokens = weight * (following >= 0), weight * masked
    return (order * of_states).sum() / of_states.sum() + TOKENS * (tokens * of_tokens).sum() / of_tokens.sum()


def train(
    traces: Traces,
    held_out: Traces,
    *,
    steps: int,
    seed: int = 0,
    checkpoint: Path | None = None,
    advance: Callable[[int], None] = lambda step: None,
) -> OrderHead:
    """Trains a head, the same one for the same traces, steps and seed: that with the least loss on `held_out` of those
    that training comes to, the untrained one, which changes nothing, among them.

    Args:
        traces: to train on.
        checkpoint: a file to go on from where it is there, and to keep up to date.
        advance: called with the steps done, from the start and after each.

    Raises:
        SimsdError: the checkpoint cannot be read.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = OrderHead(traces.block_length)
    optimizer = torch.optim.AdamW(head.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    judged_by = _judged_by(held_out)
    first, best = 0, copy.deepcopy(head)
    if checkpoint is not None and checkpoint.exists():
        try:
            kept = torch.load(checkpoint, weights_only=True)
            for part, name in ((head, "head"), (optimizer, "optimizer"), (best, "best")):
                part.load_state_dict(kept[name])
            first = kept["step"]
        except (OSError, EOFError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise SimsdError(f"{checkpoint} cannot be read ({one_line(error)}): remove it, to train anew") from error
    least = _loss_of(best, judged_by)
    places, rank, final = _places(traces), traces.rank, traces.final
    advance(first)
    for step in range(first, steps):
        chosen = torch.randint(len(places), (BATCH,), generator=torch.Generator().manual_seed((seed << 32) + step))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * (1 - step / steps)
        optimizer.zero_grad()
        loss(head, examples_at(traces, rank, final, places[chosen])).backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == steps:
            now = _loss_of(head, judged_by)
            if now < least:
                least, best = now, copy.deepcopy(head)
            if checkpoint is not None:
                parts = {"head": head, "optimizer": optimizer, "best": best}
                kept = {name: part.state_dict() for name, part in parts.items()}
                _save(checkpoint, kept | {"step": step + 1})
        advance(step + 1)
    return best.eval()


def _judged_by(held_out: Traces) -> Examples:
    """States evenly spread over all that there are."""
    places = _places(held_out)
    spread = torch.linspace(0, len(places) - 1, min(len(places), JUDGED_BY)).long()
    return examples_at(held_out, held_out.rank, held_out.final, places[spread])


@torch.no_grad()
def _loss_of(head: OrderHead, examples: Examples) -> float:
    return float(loss(head, examples))


def _save(file: Path, kept: dict) -> None:
    partial = file.with_name(file.name + ".partial")
    torch.save(kept, partial)
    partial.replace(file)


@torch.no_grad()
def accuracies(head: OrderHead, traces: Traces) -> list[Accuracy]:
    """How well the head tells what is revealed next, one to `STALENESS` reveals after each state of the traces."""
    most = min(STALENESS, traces.block_length - 1)
    right, count = torch.zeros(2, most), torch.zeros(most)
    rank, final = traces.rank, traces.final
    for places in _places(traces).split(1024):
        examples = examples_at(traces, rank, final, places)
        may_follow, following = examples.open_later()[:, :, :most], examples.future[:, 1 : most + 1]
        rule = examples.log_odds[:, :, None].expand_as(may_follow)
        for kind, score in enumerate((later_log_odds(head, examples)[:, :, :most], rule)):
            told = score.masked_fill(~may_follow, -torch.inf).argmax(1)
            right[kind] += ((told == following) & (following >= 0)).sum(0)
        count += (following >= 0).sum(0)
    shares = (right / count.clamp(min=1)).tolist()
    return [Accuracy(n + 1, shares[0][n], shares[1][n], int(count[n])) for n in range(most)]
