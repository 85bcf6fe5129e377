"""Fields of several types in one buffer: what crosses between host and device must arrive where it belongs."""

from __future__ import annotations

import struct

import pytest
import torch

from simsd.decode.fields import Fields

LAYOUT = {
    "weights": (torch.float32, (3,)),
    "number": (torch.int64, ()),
    "pairs": (torch.int32, (2, 2)),
    "count": (torch.int32, ()),
    "none": (torch.int32, (0,)),
}  # 12 + 8 + 16 + 4 + 0 = 40 bytes
SCALARS = {"few": (torch.int32, ()), "big": (torch.int64, ()), "share": (torch.float32, ())}  # 16 bytes


def row(first: int) -> dict[str, object]:
    """A value of its own in every place, as a list, a tuple or alone."""
    return {
        "count": first,
        "number": first + 1,
        "weights": (first + 0.25, first + 0.5, -first),
        "pairs": [first + 2, first + 3, first + 4, first + 5],
        "none": [],
    }


def filled(*firsts: int) -> Fields:
    fields = Fields(LAYOUT, len(firsts), "cpu")
    for n, first in enumerate(firsts):
        fields.write_row(n, row(first))
    return fields


def test_every_field_keeps_its_values_beside_the_others():
    fields = filled(10, 20)
    assert {name: view.tolist() for name, view in fields.views.items()} == {
        "weights": [[10.25, 10.5, -10.0], [20.25, 20.5, -20.0]],
        "number": [11, 21],
        "pairs": [[[12, 13], [14, 15]], [[22, 23], [24, 25]]],
        "count": [10, 20],
        "none": [[], []],
    }
    assert {name: (view.dtype, view.shape[1:]) for name, view in fields.views.items()} == LAYOUT


@pytest.mark.parametrize("count", [0, 1, 3])
def test_rows_are_as_wide_as_the_fields_in_whole_words(count):
    assert Fields(LAYOUT, count, "cpu").buffer.shape == (count, 40)
    assert Fields(SCALARS, count, "cpu").buffer.shape == (count, 16)
    assert Fields({"few": (torch.int32, ())}, count, "cpu").buffer.shape == (count, 8)


def test_a_field_lies_in_the_buffer_on_a_boundary_of_its_type():
    fields = Fields(LAYOUT, 3, "cpu")
    begin, end = fields.buffer.data_ptr(), fields.buffer.data_ptr() + fields.buffer.numel()
    for name, view in fields.views.items():
        for one in view:
            assert one.numel() == 0 or begin <= one.data_ptr() < end, name
            assert one.data_ptr() % view.dtype.itemsize == 0, name
    fields.buffer.fill_(1)
    assert fields.views["number"].tolist() == [0x0101010101010101] * 3
    assert fields.views["pairs"][2].tolist() == [[0x01010101] * 2] * 2


def test_new_fields_are_zero():
    assert not any(view.any() for view in Fields(LAYOUT, 2, "cpu").views.values())


def test_extreme_values_arrive_and_do_not_spill_over():
    fields = filled(0, 0)
    fields.write_row(0, row(0) | {"number": -(2**63), "count": -(2**31), "weights": [float("inf"), 3.4e38, 1e-30]})
    fields.write_row(1, row(0) | {"number": 2**63 - 1, "count": 2**31 - 1})
    assert fields.views["number"].tolist() == [-(2**63), 2**63 - 1]
    assert fields.views["count"].tolist() == [-(2**31), 2**31 - 1]
    assert torch.equal(fields.views["weights"][0], torch.tensor([torch.inf, 3.4e38, 1e-30]))
    assert fields.views["pairs"].tolist() == [[[2, 3], [4, 5]]] * 2


def test_a_written_row_leaves_the_others_alone():
    fields = filled(10, 20, 30)
    before = fields.buffer.clone()
    fields.write_row(1, row(50))
    assert torch.equal(fields.buffer[::2], before[::2]) and torch.equal(fields.buffer[1], filled(50).buffer[0])


@pytest.mark.parametrize("values", [{"count": 2**31}, {"number": 2**63}, {"count": 0.5}, {"pairs": [1, 2, 3]}], ids=str)
def test_what_does_not_fit_is_refused_and_nothing_is_written(values):
    fields = filled(10)
    before = fields.buffer.clone()
    with pytest.raises(struct.error):
        fields.write_row(0, row(20) | values)
    assert torch.equal(fields.buffer, before)


def test_columns_are_written_by_row_whatever_their_order():
    fields = Fields(SCALARS, 3, "cpu")
    fields.write({"share": [0.5, 0.25, 1], "few": [1, 2, 3], "big": [2**40, -1, 0]})
    got = {name: view.tolist() for name, view in fields.views.items()}
    assert got == {"few": [1, 2, 3], "big": [2**40, -1, 0], "share": [0.5, 0.25, 1.0]}


@pytest.mark.parametrize("few", [[1, 2], [1, 2, 3, 4]], ids=["fewer", "more"])
def test_a_column_of_another_length_is_refused(few):
    with pytest.raises(ValueError):
        Fields(SCALARS, 3, "cpu").write({"share": [0.5] * 3, "few": few, "big": [0] * 3})


def test_a_copy_is_of_all_rows_and_goes_its_own_way():
    fields, other = filled(0, 0), filled(10, 20)
    seen = fields.views["weights"]
    fields.copy(other)
    other.views["weights"].zero_()
    assert seen.tolist() == [[10.25, 10.5, -10.0], [20.25, 20.5, -20.0]] and fields.views["count"].tolist() == [10, 20]
