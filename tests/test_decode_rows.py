"""The rows that an iteration sends, against the masks of `Visibility` (which the golden cases pin down)."""

from __future__ import annotations

import pytest
import torch

from simsd.decode import rows as layouts
from simsd_kernels import INF, Visibility

SCRATCH, SLOTS = 64, 128
MASK = 99


def ints(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def dense(rows: layouts.Rows, end: int, length: int) -> torch.Tensor:
    """What each live row of slot 0 sees: clean slots, then the rows themselves."""
    birth, death = layouts.key_lifetimes(rows, ints(end, 0), length, SLOTS)
    live = rows.clock[0] >= 0
    seen = Visibility(rows.clock[0], birth[0], death[0]).dense()
    assert not seen[~live].any()
    order = torch.cat([torch.arange(end), rows.slots[0][live].long()])
    assert not seen[:, [slot for slot in range(SLOTS) if slot not in order.tolist()]].any()  # dead slots stay unseen
    return seen[live][:, order]


def two_slots(*tensors: torch.Tensor):
    """A second slot beside each: whatever it holds must not matter."""
    return (torch.stack([tensor, torch.zeros_like(tensor)]) for tensor in tensors)


@pytest.mark.parametrize("length", [1, 2, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_verification_rows_draw_the_published_mask(length, seed):
    generator = torch.Generator().manual_seed(seed)
    start = 3 * length
    steps = torch.randint(1, length + 1, (length,), generator=generator, dtype=torch.int32)
    tokens, reveal_step = two_slots(torch.arange(length), steps)
    rows = layouts.temporal_rows(tokens, reveal_step, ints(0, 0), ints(start, 0), SCRATCH, MASK)

    labels = torch.cat([torch.zeros(start), steps, torch.full((length,), length + 1)]).long()
    ids = torch.cat([torch.full((start,), -1), torch.zeros(2 * length)]).long()
    published = Visibility.from_labels(labels, ids, length).dense()[start:]
    assert torch.equal(dense(rows, start, length), published)


@pytest.mark.parametrize("known", [0, 1, 3])
def test_partly_known_and_undrafted_positions(known):
    length, start = 4, 8
    steps = ints(*[0] * known, *[2, 0, 1, 3][known:])  # position 1 was never drafted
    tokens, reveal_step = two_slots(torch.tensor([5, 6, 7, 8]), steps)
    rows = layouts.temporal_rows(tokens, reveal_step, ints(known, 0), ints(start, 0), SCRATCH, MASK)
    expected = Visibility.temporal([0] * known + [2, -1, 1, 3][known:], start).dense()
    dead = 1 if known <= 1 else 0  # the reference row of a position never drafted
    keep = [i for i in range(expected.shape[0]) if not (dead and i == 1)]
    assert torch.equal(dense(rows, start, length), expected[keep][:, [*range(start), *(start + i for i in keep)]])
    assert rows.tokens[0].tolist() == [5, 6, 7, 8] + [MASK] * length
    assert rows.positions[0].tolist() == [8, 9, 10, 11] * 2
    assert len(set(rows.slots[0][rows.slots[0] >= 0].tolist())) == int((rows.slots[0] >= 0).sum())


@pytest.mark.parametrize(("start", "known"), [(0, 0), (0, 2), (8, 0), (8, 1)])
def test_rows_that_tell_of_the_next_position_see_what_its_mask_does_and_nobody_sees_them(start, known):
    length, drafted = 4, [2, 0, 3, 1]  # position 1 was never drafted
    steps = ints(*[0] * known, *drafted[known:])
    tokens, reveal_step = two_slots(torch.tensor([5, 6, 7, 8]), steps)
    given = tokens, reveal_step, ints(known, 0), ints(start, 0), SCRATCH, MASK
    rows, plain = layouts.temporal_rows(*given, torch.tensor([4, 0])), layouts.temporal_rows(*given)
    birth, death = layouts.key_lifetimes(rows, ints(start, 0), length, SLOTS)
    seen = Visibility(rows.clock[0], birth[0], death[0]).dense()
    without = layouts.key_lifetimes(plain, ints(start, 0), length, SLOTS)
    assert torch.equal(seen[: 2 * length], Visibility(plain.clock[0], *(x[0] for x in without)).dense())
    assert torch.equal(seen[2 * length + 1 :], seen[length + 1 : 2 * length])
    if not known:  # the last token before the block sees its own block and those before
        first = seen[2 * length].nonzero().flatten().tolist()
        assert first == (list(range(start)) if start else seen[length].nonzero().flatten().tolist())
    # The position before holds what the draft had there by then; where known is 0, it revealed 3, 0 and 2, in turn.
    before = {0: [4 if start else MASK, 5, MASK, MASK], 1: [4, 5, MASK, MASK], 2: [MASK, 5, 6, MASK]}[known]
    assert rows.tokens[0, 2 * length + known :].tolist() == before[known:]
    assert rows.positions[0, 2 * length :].tolist() == [max(start + i - 1, 0) for i in range(length)]


def test_pending_rows_are_block_causal_and_ragged():
    text = torch.arange(40).view(2, 20)
    rows = layouts.pending_rows(text, ints(4, 0), ints(12, 4), 8, 4)
    assert rows.tokens[0].tolist() == list(range(4, 12)) and rows.tokens[1, :4].tolist() == list(range(20, 24))
    assert rows.slots.tolist() == [list(range(4, 12)), [0, 1, 2, 3, -1, -1, -1, -1]]
    birth, death = layouts.key_lifetimes(rows, ints(12, 4), 4, SLOTS)
    seen = Visibility(rows.clock, birth, death).dense()
    for row, position in enumerate(range(4, 12)):
        assert seen[0, row].nonzero().flatten().tolist() == list(range((position // 4 + 1) * 4))
    assert seen[1, :4].nonzero()[:, 1].tolist() == [0, 1, 2, 3] * 4 and not seen[1, 4:].any()


def test_a_slot_left_out_neither_sees_nor_is_seen():
    steps = torch.ones((2, 4), dtype=torch.int32)
    rows = layouts.temporal_rows(torch.arange(8).view(2, 4), steps, ints(0, 0), ints(8, 8), SCRATCH, MASK)
    rows = rows.only(torch.tensor([True, False]))
    birth, death = layouts.key_lifetimes(rows, ints(8, -1), 4, SLOTS)
    assert (birth[1] == INF).all() and (rows.clock[1] == -1).all() and (rows.slots[1] == -1).all()
    assert Visibility(rows.clock, birth, death).dense()[0].any()
