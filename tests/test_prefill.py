"""Prompts whose keys and values go ahead of the iterations, chunk by chunk."""

from __future__ import annotations

import pytest
import torch

import simsd
from recorded import Batch, request
from replays import PROMPTS
from simsd.decode.draft import state_logits
from simsd.decode.iteration import Shape
from simsd.decode.prefill import prefill
from stand_ins import MASK, random_sdar

SHAPE = Shape(lookahead=1, states=1, logits_rows=5 * 4, draft_blocks=1)
STARTS = [0, 0, 4, 4, 16]  # whole blocks of PROMPTS
PACKED = pytest.mark.parametrize("packed", [True, False], ids=["packed", "static"])


def opened(target, draft, packed: bool) -> Batch:
    batch = Batch(target, draft, [SHAPE], len(PROMPTS), 64, packed)
    for runner in (batch.target, batch.draft):
        runner.cache.keys.zero_()
        runner.cache.values.zero_()
    for slot, prompt in enumerate(PROMPTS):
        batch.open(slot, slot + 1, request(slot, target, prompt, max_new_tokens=8))
    return batch


@PACKED
def test_each_slot_goes_as_far_as_its_whole_blocks(target, draft, packed):
    batch = opened(target, draft, packed)
    slots, lengths = batch.slots, []
    for blocks in (1, 2, 3):
        prefill(slots, batch.target, slots.target_kv_len, range(len(PROMPTS)), blocks)
        lengths.append(slots.target_kv_len.tolist())
    assert lengths == [[0, 0, 4, 4, 4], [0, 0, 4, 4, 12], [0, 0, 4, 4, 16]]
    assert slots.draft_kv_len.tolist() == [0] * 5  # its own cache is as it was
    assert slots.start.tolist() == STARTS
    written = batch.stored(batch.target).abs().amax((0, 1, 3, 5)) > 0  # [B, S]
    assert written.sum(1).tolist() == STARTS and all(written[b, :n].all() for b, n in enumerate(STARTS))


@PACKED
@pytest.mark.parametrize("chunks", [[1] * 4, [3, 1], [1, 2, 4], [4, 1]], ids=str)
def test_the_next_forward_sees_the_prompt_whatever_the_chunks(target, draft, packed, chunks):
    """What behind a prompt is masked has the logits of one forward over all of it."""
    batch = opened(target, draft, packed)
    slots = batch.slots
    for blocks in chunks:
        prefill(slots, batch.draft, slots.draft_kv_len, range(len(PROMPTS)), blocks)
    assert slots.draft_kv_len.tolist() == STARTS
    with torch.inference_mode():
        logits, rows = state_logits(slots, batch.draft, slots.start, slots.revealed, slots.step, SHAPE)
    for slot, (prompt, start) in enumerate(zip(PROMPTS, STARTS, strict=True)):
        whole = torch.tensor([prompt + [MASK] * (start + 4 - len(prompt))])
        with torch.no_grad():
            expected = draft.model(whole).logits[0, len(prompt) :]
        masked = rows[slot][rows[slot] >= 0].long()
        torch.testing.assert_close(logits[masked], expected, rtol=1e-4, atol=1e-4)


@PACKED
def test_chunks_store_the_bits_of_one_forward(draft, packed):
    target = simsd.load(random_sdar(0).model, deterministic=True)
    batches = [opened(target, draft, packed) for _ in range(2)]
    for batch, chunks in zip(batches, ([1, 1, 2], [9]), strict=True):
        for blocks in chunks:
            prefill(batch.slots, batch.target, batch.slots.target_kv_len, range(len(PROMPTS)), blocks)
    assert torch.equal(batches[0].stored(batches[0].target), batches[1].stored(batches[1].target))


def test_a_prompt_that_is_partly_in_place_goes_on_from_there(target, draft):
    whole, resumed = (opened(target, draft, True) for _ in range(2))
    prefill(whole.slots, whole.target, whole.slots.target_kv_len, range(len(PROMPTS)), 4)
    prefill(resumed.slots, resumed.target, resumed.slots.target_kv_len, range(len(PROMPTS)), 2)
    first = resumed.stored(resumed.target)[:, :, 4, :, :8].clone()
    resumed.slots.text[4, :8] = 0  # not looked at again
    prefill(resumed.slots, resumed.target, resumed.slots.target_kv_len, range(len(PROMPTS)), 2)
    assert torch.equal(resumed.stored(resumed.target)[:, :, 4, :, :8], first)
    torch.testing.assert_close(resumed.stored(resumed.target), whole.stored(whole.target), rtol=1e-4, atol=1e-5)


@PACKED
def test_a_free_slot_takes_no_part(target, draft, packed):
    batch = opened(target, draft, packed)
    batch.slots.close(4)
    batch.slots.target_kv_len[4] = 8
    prefill(batch.slots, batch.target, batch.slots.target_kv_len, range(len(PROMPTS)), 4)
    assert batch.slots.target_kv_len.tolist() == [0, 0, 4, 4, 8]
    assert not batch.stored(batch.target)[:, :, 4].any()


def test_a_prompt_longer_than_one_chunk_decodes_as_with_one(target, draft):
    prompt = [i % 50 + 1 for i in range(50)]
    whole = simsd.generate(target, [prompt], draft, max_new_tokens=8)[0]
    chunked = simsd.generate(target, [prompt], draft, max_new_tokens=8, block_length=4, prefill_rows=16)[0]
    assert chunked.tokens == whole.tokens and chunked.probs == whole.probs
    assert chunked.stats.target_prefill_forwards == 2  # 16 + 16; the other 16 rode along
    assert whole.stats.target_prefill_forwards == 0
