"""Proposals from the text itself (prompt lookup): what followed the last tokens where they stood before, in the prompt
or in what was generated. They cost no forward. Functions of static shape, as an iteration is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from simsd.decode import draft as drafting
from simsd.decode.exchange import LOOKUP_DRAFT, Commands
from simsd.decode.slots import Slots
from simsd.models.runner import ModelRunner
from simsd_kernels.advance_slots.api import NO_END

if TYPE_CHECKING:
    from simsd.decode.iteration import Shape

# Of the tokens right before the first masked position, so many are looked for, and so many must have stood there.
LONGEST, SHORTEST = 4, 2
PLACES = 8  # where they stood that are looked at: the longest matches, of equals the latest
# Log-odds of the first position of a block above any noise: no Gumbel number of 32 bits is 26 above another.
CERTAIN = 26.0


def draft_without_model(slots: Slots, commands: Commands, target: ModelRunner, shape: Shape) -> None:
    """What is drafted without a forward: current blocks from the target's last logits, where they tell of them, and
    what the text repeats behind them. Both replace a standing proposal."""
    if shape.self_draft:
        drafting.from_last_logits(slots, commands, target, shape)
    if shape.lookup:
        by_lookup(slots, commands, shape, target.packed)


def by_lookup(slots: Slots, commands: Commands, shape: Shape, packed: bool) -> None:
    """Proposes the blocks of the shape in slots of that mode whose last tokens stood in their texts before; the current
    one where the target's last logits have not.

    The match must agree with what is revealed behind the first masked position, too. Where it is nearer than what is to
    propose is long, the text between the two is taken to go on repeating. `packed`: whether the host may look.
    """
    blocks, length = shape.lookahead, slots.length
    asked = (commands.mode == LOOKUP_DRAFT) & (commands.runs > 0) & (slots.start >= 0)
    own = (slots.last_rows >= 0).any(1)
    if not shape.self_draft:
        own = torch.zeros_like(own)
    start = slots.start.clamp(min=0)
    known = slots.bits_in(slots.revealed) | own[:, None]  # [B, L]
    known = nn.functional.pad(known, (0, blocks * length))
    first = start + (~known).int().argmax(1)  # [B], the first position that nothing is known of
    place, matched = _matches(slots.text, first, packed)  # [B, M]

    places = start[:, None] + torch.arange(blocks * length, device=slots.device)  # [B, K * L], in the text
    known = known[:, : blocks * length]
    now = slots.text.gather(1, places)
    behind = places - first[:, None]
    period = (first[:, None] - place).clamp(min=1)
    source = place[..., None] + behind.clamp(min=0)[:, None] % period[..., None]
    tokens = slots.text.gather(1, source.flatten(1)).view(source.shape)  # [B, M, K * L]
    agrees = ((tokens == now[:, None]) | ~known[:, None] | (behind < 0)[:, None]).all(2)
    found = matched & agrees  # [B, M], the best first
    tokens = torch.where(known, now, tokens[slots.index, found.int().argmax(1)])
    found = found.any(1) & asked
    where = found[:, None] & (~known).view(-1, blocks, length).any(2)  # [B, K]
    _propose(slots, where, tokens, places, shape.noise)


def _matches(text: Tensor, first: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """Places before `first` (integers [B]) behind which the text may go on as it did there: int64 [B, M], the best
    first, and whether each is behind a match (bool)."""
    if packed:
        text = text[:, : max(int(first.amax()), 1)]
    width = text.shape[1]
    before = nn.functional.pad(text, (LONGEST, 0), value=-1)
    windows = before.unfold(1, LONGEST, 1)[:, :width]  # [B, W, N], the tokens before each place
    last = before.gather(1, first[:, None] + torch.arange(LONGEST, device=text.device))  # [B, N], those before `first`
    equal = (windows == last[:, None]) & (last >= 0)[:, None]
    size = equal.flip(2).cumprod(2, dtype=torch.int32).sum(2)  # of the match that ends before each place
    place = torch.arange(width, device=text.device)
    size.masked_fill_(place >= first[:, None], 0)
    rank, place = (size * width + place).topk(min(PLACES, width), dim=1)
    matched = rank >= SHORTEST * width
    return torch.where(matched, place, 0), matched


def _propose(slots: Slots, where: Tensor, tokens: Tensor, places: Tensor, noise: bool) -> None:
    """Makes tokens [B, K * L] at these places the proposal of the blocks `where` (bool [B, K]), each as certain as the
    others: whether they are right, the calibration says. The first position of a block ranks first."""
    blocks, length = where.shape[1], slots.length
    shape = -1, blocks, length
    falling = CERTAIN + torch.arange(length, 0, -1, dtype=torch.float32, device=slots.device)  # [L]
    values = tokens.view(shape), torch.ones_like(falling), falling, torch.zeros_like(falling)
    sharpness = slots.order_sharpness[:, drafting.LOOKUP, None]
    for mine, new in zip(slots.proposal(blocks), (*values, sharpness), strict=True):
        mine.copy_(torch.where(where if mine.dim() == 2 else where[..., None], new, mine))
    if noise:
        _write_logits(slots, where, tokens.view(shape), falling)
    slots.text.scatter_(
        1, places, torch.where(where.repeat_interleave(length, 1), tokens, slots.text.gather(1, places))
    )
    stop = (tokens[..., None] == slots.stop_ids[:, None]) & (slots.stop_ids >= 0)[:, None]
    stop = (stop.any(2) & (places >= slots.prompt_len[:, None])).view(shape).any(2)  # [B, K]
    end = torch.where(stop.any(1), stop.int().argmax(1) + 1, NO_END)
    found = where.any(1)
    slots.draft_end.copy_(torch.where(found, end, slots.draft_end))
    slots.proposal_depth.masked_fill_(found, blocks)


def _write_logits(slots: Slots, where: Tensor, tokens: Tensor, above: Tensor) -> None:
    """Logits that give these tokens whatever noise a state has: `above` (float32 [L]) all others, in units of the
    slot's temperature where that is more than 1."""
    logits, where = slots.draft_logits[:, : tokens.shape[1]], where[..., None, None]
    most = torch.finfo(logits.dtype).max
    top = (slots.temperature.clamp(min=1.0)[:, None] * above).clamp(max=most)[:, None].to(logits.dtype)  # [B, 1, L]
    logits.masked_fill_(where, 0.0)
    index = tokens[..., None]
    logits.scatter_(3, index, torch.where(where, top[..., None], logits.gather(3, index)))
