"""Slots: what a request leaves in one, what its successor finds there, and what its neighbours notice."""

from __future__ import annotations

import pytest
import torch

from simsd import SamplingParams
from simsd.decode.slots import NO_STOP_ID, Slots, layout
from simsd.engine.request import Request
from simsd_kernels.advance_slots.api import NO_END
from simsd_kernels.banned import is_banned

LENGTH, STOP_IDS, LOOKAHEAD = 4, 3, 2
BANNED, VOCABULARY = (5, 6, 7), 40


def made(count: int = 2, length: int = LENGTH, capacity: int = 16) -> Slots:
    return Slots(count, length, capacity, LOOKAHEAD, STOP_IDS, torch.device("cpu"))


def settings(
    tokens: list[int], epoch: int = 1, length: int = LENGTH, ends: tuple = (), sub_blocks: tuple = (), **params
) -> dict:
    request = Request(0, tokens, SamplingParams(**params), params.get("seed", 0), ends, None)
    return request.slot_settings(length, epoch, STOP_IDS, sub_blocks)


def opened(tokens: list[int], slot: int = 0, **more) -> Slots:
    slots = made()
    slots.open(slot, tokens, settings(tokens, **more))
    return slots


def packed(slots: Slots, slot: int) -> dict[str, list]:
    return {name: getattr(slots, name)[slot].tolist() for name in layout(slots.length, STOP_IDS)}


@pytest.mark.parametrize(
    ("count", "start", "revealed"), [(0, 0, 0), (1, 0, 0b1), (3, 0, 0b111), (4, 4, 0), (8, 8, 0), (10, 8, 0b11)]
)
def test_what_is_no_whole_block_of_the_prompt_is_known_in_the_current_one(count, start, revealed):
    tokens = list(range(10, 10 + count))
    slots = opened(tokens)
    assert (slots.start[0], slots.revealed[0], slots.prompt_len[0]) == (start, revealed, count)
    assert slots.text[0, :count].tolist() == tokens
    assert (slots.step[0], slots.target_kv_len[0], slots.draft_kv_len[0]) == (0, 0, 0)
    assert slots.prob[0].tolist() == [1.0] * 4 and slots.last_rows[0].tolist() == [-1] * 4
    assert (slots.proposal_depth[0], slots.draft_end[0], slots.draft_forwards[0]) == (0, NO_END, 0)


def test_a_block_of_64_tokens_of_which_63_are_known():
    slots = made(1, length=64, capacity=128)
    slots.open(0, list(range(127)), settings(list(range(127)), length=64))
    assert (slots.start[0], slots.revealed[0]) == (64, 2**63 - 1)
    assert slots.bits_in(slots.revealed)[0].tolist() == [True] * 63 + [False]


def test_settings_arrive_as_the_request_has_them():
    slots = opened(
        [1, 2, 3],
        epoch=2**31 - 1,
        ends=(9, 8),
        max_new_tokens=6,
        seed=-(2**63),
        steps=3,
        strategy="entropy_bounded",
        entropy_bound=0.75,
        temperature=0.5,
        top_k=7,
        top_p=0.25,
        verify="temporal",
        end_gate=0.5,
    )
    got = packed(slots, 0)
    assert got["end"] == 12  # 3 + 6 in whole blocks
    assert (got["seed"], got["request_epoch"]) == (-(2**63), 2**31 - 1)
    assert (got["schedule"], got["steps"]) == ([2, 1, 1, 0], 3)
    assert (got["strategy"], got["threshold"]) == (3, 0.75)
    assert (got["temperature"], got["top_k"], got["top_p"], got["end_gate"]) == (0.5, 7, 0.25, 0.5)
    assert got["stop_ids"] == [9, 8, NO_STOP_ID] and got["order_sharpness"] == [1.0, 0.25, 0.0]


def test_sub_blocks_are_the_set_of_positions_at_which_one_begins():
    got = packed(opened([], steps=3, sub_blocks=(1, 3)), 0)
    assert (got["sub_blocks"], got["schedule"]) == (0b10, [1, 2, 1, 0])
    assert packed(opened([], sub_blocks=(4,)), 0)["sub_blocks"] == packed(opened([]), 0)["sub_blocks"] == 0
    slots = made(1, length=64, capacity=128)
    slots.open(0, [], settings([], length=64, sub_blocks=(32, 31, 1)))
    assert slots.sub_blocks.tolist() == [-(2**63) + 2**32]


def test_more_end_tokens_than_there_is_room_for_are_left_to_the_host():
    assert opened([1], ends=(9, 8, 7, 6)).stop_ids[0].tolist() == [9, 8, 7]


def test_keys_and_values_that_are_in_place_are_counted():
    slots = made()
    slots.open(1, list(range(9)), settings(list(range(9))), kv_lens=(8, 4))
    assert slots.target_kv_len.tolist() == [0, 8] and slots.draft_kv_len.tolist() == [0, 4]


def test_a_successor_finds_nothing_of_its_predecessor():
    slots = opened(list(range(14)), temperature=1.0, ends=(3, 4, 5))
    for name in layout(LENGTH, STOP_IDS):
        getattr(slots, name)[0] = 2
    slots.open(0, [8, 9], settings([8, 9], epoch=5))
    assert packed(slots, 0) == packed(opened([8, 9], epoch=5), 0)
    assert slots.text[0, :2].tolist() == [8, 9]


def test_neighbours_do_not_notice_who_comes_and_goes():
    slots = opened([1, 2, 3, 4, 5], slot=1)
    before, text = packed(slots, 1), slots.text[1].clone()
    slots.open(0, list(range(16)), settings(list(range(16))))
    slots.close(0)
    assert packed(slots, 1) == before and torch.equal(slots.text[1], text)


def test_slots_are_free_until_opened_and_once_closed():
    slots = made()
    assert slots.start.tolist() == [-1, -1]
    slots.open(1, [1] * 6, settings([1] * 6))
    assert slots.start.tolist() == [-1, 4]
    slots.close(1)
    assert slots.start.tolist() == [-1, -1]


def test_the_longest_sequence_has_room_for_a_walk_behind_it():
    """A walk may finish the lookahead and one block more, and reveal part of yet another."""
    slots = made(1, capacity=16)
    slots.open(0, list(range(16)), settings(list(range(16))))
    assert slots.start[0] == 16 and slots.text.shape == (1, 16 + (LOOKAHEAD + 2) * LENGTH)


def test_end_tokens_that_are_asked_for_are_not_banned_and_captured_bans_stay_where_they_are():
    slots = made()
    slots.ban(BANNED, VOCABULARY)
    slots.ban(BANNED, VOCABULARY, allowed=(6,))
    first = slots.banned((6,))
    slots.ban(BANNED, VOCABULARY, allowed=(6,))
    assert slots.banned((6,)) is first
    slots.ban(BANNED, VOCABULARY, allowed=BANNED)
    found = [is_banned(slots.banned(allowed), VOCABULARY, slots.device) for allowed in ((), (6,), BANNED)]
    assert [mask.nonzero().flatten().tolist() for mask in found] == [[5, 6, 7], [5, 7], []]


def test_logits_for_noise_take_memory_only_once_they_are_needed():
    slots = made()
    assert slots.draft_logits is None
    slots.allow_noise(11, torch.bfloat16)
    first = slots.draft_logits
    assert (first.shape, first.dtype) == ((2, LOOKAHEAD, LENGTH, 11), torch.bfloat16)
    slots.allow_noise(11, torch.bfloat16)
    assert slots.draft_logits is first


def test_sets_and_spans_read_position_by_position():
    slots = made(3)
    sets = torch.tensor([0b0101, 0, 0b1000])
    assert slots.bits_in(sets).tolist() == [[True, False, True, False], [False] * 4, [False, False, False, True]]
    assert slots.span(torch.tensor([8, -1, 0], dtype=torch.int32)).tolist() == [
        [8, 9, 10, 11],
        [-1, 0, 1, 2],
        [0, 1, 2, 3],
    ]
    long = made(1, length=64, capacity=64)
    assert long.bits_in(torch.tensor([-(2**63)])).tolist() == [[False] * 63 + [True]]
