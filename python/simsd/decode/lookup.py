"""Proposals from the text itself (prompt lookup): what followed the last tokens where they stood before, in the prompt
or in what was generated. They cost no forward. Functions of static shape, as an iteration is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from simsd.decode.draft import LOOKUP, from_last_logits
from simsd.decode.exchange import LOOKUP_DRAFT, Commands
from simsd.decode.slots import Slots
from simsd.models.runner import ModelRunner
from simsd_kernels.advance_slots.api import NO_END

if TYPE_CHECKING:
    from simsd.decode.iteration import Shape

LONGEST = 4  # tokens that are looked for, those right before the first masked position; as many of them as stand there
PLACES = 8  # where they stood that are looked at: the longest matches, of equals the latest
# Log-odds of the first position of a block above any noise: no Gumbel number of 32 bits is 26 above another.
CERTAIN = 26.0


def draft_without_model(slots: Slots, commands: Commands, target: ModelRunner, shape: Shape) -> None:
    """What is drafted without a forward: from the text where that repeats itself, and from the target's last logits.

    Either replaces a standing proposal.
    """
    found = by_lookup(slots, commands, shape, target.packed) if shape.lookup else None
    if shape.self_draft:
        from_last_logits(slots, commands, target, shape, found)


def by_lookup(slots: Slots, commands: Commands, shape: Shape, packed: bool) -> Tensor:
    """Proposes all blocks of the shape in slots of that mode whose last tokens stood in their texts before; returns
    which do (bool [B]).

    The match must agree with what is revealed behind the first masked position, too. Where it is nearer than what is to
    propose is long, the text between the two is taken to go on repeating. `packed`: whether the host may look.
    """
    blocks, length = shape.lookahead, slots.length
    asked = (commands.mode == LOOKUP_DRAFT) & (commands.runs > 0) & (slots.start >= 0)
    start = slots.start.clamp(min=0)
    shown = slots.bits_in(slots.revealed)  # [B, L]
    first = start + (~shown).int().argmax(1)  # [B], the first masked position
    place, matched = _matches(slots.text, first, packed)  # [B, M]

    offsets = torch.arange(blocks * length, device=slots.device)
    places = start[:, None] + offsets  # [B, K * L], in the text
    now = slots.text.gather(1, places)
    behind = places - first[:, None]
    source = place[..., None] + behind.clamp(min=0)[:, None] % (first[:, None] - place)[..., None]
    tokens = slots.text.gather(1, source.flatten(1)).view(source.shape)  # [B, M, K * L]
    known = nn.functional.pad(shown, (0, (blocks - 1) * length))
    agrees = ((tokens == now[:, None]) | ~known[:, None] | (behind < 0)[:, None]).all(2)
    found = matched & agrees  # [B, M], the best first
    best = found.int().argmax(1)
    found = found.any(1) & asked
    tokens = torch.where(known, now, tokens[slots.index, best])
    _propose(slots, found, tokens, places, blocks, shape.noise)
    return found


def _matches(text: Tensor, first: Tensor, packed: bool) -> tuple[Tensor, Tensor]:
    """Places before `first` (integers [B]) behind which the text may go on as it did there: int64 [B, M], the best
    first, and whether each is behind a match (bool)."""
    if packed:
        text = text[:, : max(int(first.amax()), 1)]
    width = text.shape[1]
    before = nn.functional.pad(text, (LONGEST, 0), value=-1)
    place = torch.arange(width, device=text.device)
    here = place < first[:, None]
    size = torch.zeros_like(here, dtype=torch.int32)  # of the match that ends before each place
    for n in range(1, LONGEST + 1):
        last = before.gather(1, (first + LONGEST - n).long().clamp(max=width + LONGEST - 1)[:, None])
        here = here & (before[:, LONGEST - n : LONGEST - n + width] == last) & (last >= 0)
        size += here
    rank, place = (size * width + place).topk(min(PLACES, width), dim=1)
    matched = (rank >= width) & (place < first[:, None])
    return torch.where(matched, place, first[:, None] - 1), matched


def _propose(slots: Slots, where: Tensor, tokens: Tensor, places: Tensor, blocks: int, noise: bool) -> None:
    """Makes tokens [B, K * L] at these places the proposal of the slots `where`, each as certain as the others: whether
    they are right, the calibration says. The first position of a block ranks first."""
    length = slots.length
    shape = -1, blocks, length
    falling = CERTAIN + torch.arange(length, 0, -1, dtype=torch.float32, device=slots.device)  # [L]
    values = tokens.view(shape), torch.ones_like(falling), falling, torch.zeros_like(falling)
    sharpness = slots.order_sharpness[:, LOOKUP, None]
    for mine, new in zip(slots.proposal(blocks), (*values, sharpness), strict=True):
        mine.copy_(torch.where(where.view(-1, *[1] * (mine.dim() - 1)), new, mine))
    if noise:
        _write_logits(slots, where, tokens.view(shape), falling)
    slots.text.scatter_(1, places, torch.where(where[:, None], tokens, slots.text.gather(1, places)))
    stop = (tokens[..., None] == slots.stop_ids[:, None]) & (slots.stop_ids >= 0)[:, None]
    stop = (stop.any(2) & (places >= slots.prompt_len[:, None])).view(shape).any(2)  # [B, K]
    end = torch.where(stop.any(1), stop.int().argmax(1) + 1, NO_END)
    slots.draft_end.copy_(torch.where(where, end, slots.draft_end))
    slots.proposal_depth.masked_fill_(where, blocks)


def _write_logits(slots: Slots, where: Tensor, tokens: Tensor, above: Tensor) -> None:
    """Logits that give these tokens whatever noise a state has: `above` (float32 [L]) all others, in units of the
    slot's temperature where that is more than 1."""
    logits = slots.draft_logits[:, : tokens.shape[1]]
    most = torch.finfo(logits.dtype).max
    top = (slots.temperature.clamp(min=1.0)[:, None] * above).clamp(max=most)[:, None].to(logits.dtype)  # [B, 1, L]
    logits.masked_fill_(where[:, None, None, None], 0.0)
    index = tokens[..., None]
    before = logits.gather(3, index)
    logits.scatter_(3, index, torch.where(where[:, None, None, None], top[..., None], before))
