"""What is kept of the states that the target saw, against plain forwards of them."""

from __future__ import annotations

import pytest
import torch

import simsd
from recorded import Batch, request
from replays import PROMPTS, block_logits
from simsd.decode.exchange import MODEL_DRAFT, SELF_DRAFT
from simsd.decode.iteration import Shape
from simsd.decode.seen import NO_STATE, seen_states
from simsd.order.head import OrderHead
from stand_ins import MASK

LENGTH, SLOTS = 4, 3
SHAPE = Shape(lookahead=1, states=12, logits_rows=SLOTS * 12 * LENGTH, self_draft=True, keeps_logits=True)


def opened(target, draft) -> Batch:
    batch = Batch(target, draft, [SHAPE], SLOTS, 64, packed=True)
    for slot, prompt in enumerate(PROMPTS[:SLOTS]):
        batch.open(slot, slot + 1, request(slot, target, prompt, max_new_tokens=24, end_token_ids=()))
    return batch


def iterate(batch: Batch, **changes) -> list:
    columns = {"runs": 1, "mode": SELF_DRAFT, "depth": 0, "peeks": 1, "head": 1}
    columns |= {"calibration": 1.0, "min_visit_prob": 0.0, "row_budget": 11 * LENGTH * SLOTS}
    batch.commands.write(**{name: [value] * SLOTS for name, value in columns.items()} | changes)
    batch.iterate(SHAPE)
    return [report for _, report in batch.report.of(1).read()]


@torch.inference_mode()
def seen(batch: Batch):
    return seen_states(batch.slots, batch.commands, batch.target, SHAPE)


def states_of(found, slot: int) -> list[tuple[int, int, list[int], list[int]]]:
    """Block, whether exact, positions that are revealed, and tokens of each state."""
    rows = zip(*(x[slot].tolist() for x in (found.block, found.exact, found.revealed, found.tokens)), strict=True)
    return [
        (block, exact, [i for i in range(LENGTH) if bits >> i & 1], tokens)
        for block, exact, bits, tokens in rows
        if bits != NO_STATE
    ]


def test_an_exact_state_has_what_the_target_draws_in_it_now(target, draft):
    batch = opened(target, draft)
    exact_ones = others = 0
    for _ in range(8):
        iterate(batch)
        found = seen(batch)
        for slot in range(SLOTS):
            start = int(batch.slots.start[slot])
            if start < 0:
                continue
            text = batch.slots.text[slot, :start].tolist()
            for block, exact, known, tokens in states_of(found, slot):
                others += not exact
                if not exact:
                    continue
                assert block == 0
                state = [tokens[i] if i in known else MASK for i in range(LENGTH)]
                logits = block_logits(target, text, state)
                assert all(tokens[i] == int(logits[i].argmax()) for i in range(LENGTH) if i not in known)
                exact_ones += 1
    assert exact_ones > 20 and others > 5


def test_what_was_peeked_at_is_proposed_as_soon_as_the_text_is_there(target, draft):
    """Hardly a forward is spent on a fresh block of which nothing is known: where a prompt ends, or one forward goes
    through two blocks."""
    unknown = []
    for peeks in (0, 1):
        batch, fresh = opened(target, draft), 0
        iterate(batch)
        few = {"row_budget": [4 * LENGTH * SLOTS] * SLOTS}
        while reports := iterate(batch, peeks=[peeks] * SLOTS, **few):
            going_on = [report.self_draftable for report in reports if not report.ended]
            fresh += sum(count == 0 for count in going_on)
            running = [slot for slot in range(SLOTS) if batch.slots.start[slot] >= 0]
            assert going_on == [int((batch.slots.last_rows[slot] >= 0).sum()) for slot in running]
        unknown.append(fresh)
    assert unknown[1] < unknown[0] / 3


@pytest.mark.parametrize("peeks", [0, 1])
def test_the_texts_are_native_decodings(target, draft, peeks):
    batch = opened(target, draft)
    tokens = [list(prompt) for prompt in PROMPTS[:SLOTS]]
    while any(batch.slots.start >= 0):
        iterate(batch, peeks=[peeks] * SLOTS)
        for slot, report in batch.report.of(1).read():
            new = len(tokens[slot]) % LENGTH
            for block in report.blocks:
                tokens[slot] += block.tokens[new:]
                new = 0
    native = simsd.generate(target, PROMPTS[:SLOTS], verify="none", max_new_tokens=24, end_token_ids=())
    for slot, result in enumerate(native):
        assert tokens[slot][len(PROMPTS[slot]) :][:24] == result.tokens


def test_nothing_is_known_of_who_comes_next_who_sat_out_or_whom_the_draft_model_drafts_for(target, draft):
    batch = opened(target, draft)
    iterate(batch)
    iterate(batch)
    assert all(states_of(seen(batch), slot) for slot in range(SLOTS))
    batch.open(0, 9, request(9, target, PROMPTS[3], max_new_tokens=8))
    batch.commands.mode[1] = MODEL_DRAFT
    assert [bool(states_of(seen(batch), slot)) for slot in range(SLOTS)] == [False, False, True]
    iterate(batch, runs=[1, 0, 1])
    assert [bool(states_of(seen(batch), slot)) for slot in range(SLOTS)] == [True, False, True]


@torch.inference_mode()
def test_a_head_says_the_same_whether_or_not_rows_are_packed(target, draft):
    torch.manual_seed(0)
    head = OrderHead(LENGTH)
    for parameter in head.parameters():
        parameter += torch.randn_like(parameter)
    batch = opened(target, draft)
    iterate(batch)
    iterate(batch)
    batch.target.order_head = head
    packed = seen(batch)
    batch.target.packed = False
    dense = seen(batch)
    live = packed.revealed != NO_STATE
    assert live.any() and (packed.shift[live] != 0).any()
    for name in ("shift", "pair"):
        torch.testing.assert_close(getattr(packed, name)[live], getattr(dense, name)[live])
    torch.testing.assert_close(packed.sharpness, batch.slots.order_sharpness[:, 0] * head.sharpness)
