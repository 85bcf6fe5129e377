"""The block table: where in memory the places of a slot are."""

from __future__ import annotations

import pytest
import torch

from simsd.models.block_table import BlockTable


def table() -> BlockTable:
    return BlockTable(torch.tensor([[3, -1, 0], [-1, 2, 1]], dtype=torch.int32), 16)


def places(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def test_a_place_is_an_offset_into_its_page():
    found = table().find(places([0, 15, 32, 47], [16, 31, 32, 40]))
    assert found.tolist() == [[48, 63, 0, 15], [32, 47, 16, 24]] and found.dtype == torch.int32


def test_dead_rows_and_places_without_a_page_are_nowhere():
    full = BlockTable(torch.tensor([[3, 5, 0], [4, 2, 1]], dtype=torch.int32), 16)
    assert full.find(places([-1, 0], [0, -1])).tolist() == [[-1, 48], [64, -1]]
    assert table().find(places([16, 31], [0, 15])).tolist() == [[-1, -1], [-1, -1]]


def test_changes_show_in_parts_that_were_made_before():
    whole = table()
    narrow = whole.narrow(2)
    whole.set([(0, 1, [7, 8]), (1, 0, [9])])
    whole.set([])
    assert whole.pages.tolist() == [[3, 7, 8], [9, 2, 1]] and narrow.pages.tolist() == [[3, 7], [9, 2]]
    for one in (whole, narrow):
        assert one.find(places([16, 33], [15, -1])).tolist() == [[112, 129], [159, -1]]
    whole.set([(0, 1, [-1])])
    assert narrow.find(places([16], [16])).tolist() == [[-1], [32]]


def test_some_slots_have_theirs_alone():
    part = table().of(torch.tensor([1]))
    assert part.pages.tolist() == [[-1, 2, 1]]
    assert part.find(places([16, 0, -1])).tolist() == [[32, -1, -1]]


def test_a_table_is_a_copy():
    pages = torch.zeros(1, 1, dtype=torch.int32)
    made = BlockTable(pages, 16)
    pages.fill_(5)
    assert made.pages.item() == 0 and made.find(places([3])).item() == 3


@pytest.mark.parametrize("page_size", [16, 64, 256])
def test_every_place_is_where_its_page_says(page_size):
    pages = torch.randperm(12, generator=torch.Generator().manual_seed(0)).view(3, 4).int()
    every = torch.arange(4 * page_size, dtype=torch.int32).expand(3, -1)
    expected = pages.long().repeat_interleave(page_size, 1) * page_size + every % page_size
    assert torch.equal(BlockTable(pages, page_size).find(every).long(), expected)
