"""Proposals against slow replays by plain forwards, one slot and one question at a time."""

from __future__ import annotations

import math

import pytest
import torch

from recorded import Batch, request
from replays import draw, log_odds, replay_block
from simsd import GenerationConfig
from simsd.decode import draft as drafting
from simsd.decode.exchange import MODEL_DRAFT, SELF_DRAFT
from simsd.decode.iteration import Shape
from simsd.decode.prefill import prefill
from simsd_kernels.advance_slots.api import NO_END
from stand_ins import MASK

LENGTH = 4
PROMPTS = [[5, 3], [9, 8, 7, 6], [1, 2, 3, 4, 5, 6, 7]]
GREEDY = GenerationConfig(end_token_ids=())


def shape_of(blocks: int = 2, **changes) -> Shape:
    return Shape(lookahead=blocks, states=1, logits_rows=len(PROMPTS) * LENGTH, draft_blocks=blocks, **changes)


def opened(target, draft, shape: Shape, prompts=PROMPTS, new: int = 12, **settings) -> Batch:
    """Three requests whose prompts are in place."""
    batch = Batch(target, draft, [shape], len(PROMPTS), 64, packed=True)
    for slot, prompt in enumerate(prompts):
        batch.open(
            slot, slot + 1, request(slot, target, prompt, max_new_tokens=new, **{"end_token_ids": ()} | settings)
        )
    prefill(batch.slots, batch.target, batch.slots.target_kv_len, range(len(PROMPTS)), 8)
    prefill(batch.slots, batch.draft, batch.slots.draft_kv_len, range(len(PROMPTS)), 8)
    return batch


def command(batch: Batch, shape: Shape, **commands) -> None:
    """What is not given: everybody runs, drafted for by the model as deep as the shape is."""
    one = {"runs": 1, "mode": MODEL_DRAFT, "depth": shape.draft_blocks, "peeks": 0, "head": 0}
    one |= {"calibration": 1.0, "min_visit_prob": 0.0, "row_budget": 0}
    batch.commands.write(**{name: [value] * len(PROMPTS) for name, value in one.items()} | commands)


@torch.inference_mode()
def by_model(batch: Batch, shape: Shape, **commands) -> None:
    command(batch, shape, **commands)
    drafting.by_model(batch.slots, batch.commands, batch.draft, shape)


def proposal(batch: Batch, slot: int) -> list[list[int]]:
    return batch.slots.draft_tokens[slot, : int(batch.slots.proposal_depth[slot])].tolist()


def plain_logits(model, tokens: list[int]) -> torch.Tensor:
    """[4, V] of the last block."""
    with torch.no_grad():
        logits = model.model(torch.tensor([tokens])).logits[0, -LENGTH:]
    logits[:, MASK] = -math.inf
    return logits


def replay_greedy(model, prompt: list[int], blocks: int, steps: int):
    """Blocks as proposed, and the plain logits of each one's last forward with the positions that it told of."""
    text, proposed, last = prompt[: len(prompt) // 4 * 4], [], []
    for k in range(blocks):
        known = prompt[len(text) :] if k == 0 else []
        state, *_ = replay_block(model, text, known, GREEDY, steps - 1)
        logits = plain_logits(model, text + state)
        masked = [i for i in range(LENGTH) if state[i] == MASK]
        for i in masked:
            state[i] = int(logits[i].argmax())
        proposed.append(state)
        last.append((logits, masked))
        text = text + state
    return proposed, last


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_a_model_s_proposal_is_what_plain_forwards_of_it_give(target, draft, blocks, steps):
    shape = shape_of(blocks, draft_steps=steps)
    batch = opened(target, draft, shape)
    by_model(batch, shape)
    for slot, prompt in enumerate(PROMPTS):
        expected, last = replay_greedy(draft, prompt, blocks, steps)
        assert proposal(batch, slot) == expected
        for k, (logits, masked) in enumerate(last):
            prob = logits.softmax(1)[masked, [expected[k][i] for i in masked]]
            torch.testing.assert_close(batch.slots.draft_prob[slot, k, masked], prob, rtol=1e-3, atol=1e-5)
            if steps == 1:
                odds = torch.tensor([log_odds(logits[i], expected[k][i]) for i in masked])
                torch.testing.assert_close(batch.slots.draft_log_odds[slot, k, masked], odds, rtol=1e-3, atol=1e-3)
                entropy = torch.distributions.Categorical(logits=logits[masked].clamp(min=-1e9)).entropy()
                torch.testing.assert_close(batch.slots.draft_entropy[slot, k, masked], entropy, rtol=1e-3, atol=1e-3)
    assert batch.slots.draft_forwards.tolist() == [blocks * steps] * 3
    assert batch.slots.draft_kv_len.tolist() == [(blocks - 1 + n) * LENGTH for n in (0, 1, 1)]
    assert batch.slots.draft_sharpness[:, :blocks].eq(0.25).all()


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_what_a_draft_reveals_later_ranks_behind_what_it_revealed_before(target, draft, steps):
    shape = shape_of(1, draft_steps=steps)
    batch = opened(target, draft, shape)
    by_model(batch, shape)
    for slot, prompt in enumerate(PROMPTS):
        known = len(prompt) % LENGTH
        _, taken, _ = replay_block(
            draft, prompt[: len(prompt) - known], prompt[len(prompt) - known :], GREEDY, steps - 1
        )
        stage = [taken[i] or steps for i in range(known, LENGTH)]
        odds = batch.slots.draft_log_odds[slot, 0, known:].tolist()
        entropy = batch.slots.draft_entropy[slot, 0, known:].tolist()
        for i, one in enumerate(stage):
            for j, other in enumerate(stage):
                if one < other:
                    assert odds[i] > odds[j] and entropy[i] < entropy[j]


def replay_noise(logits: torch.Tensor, start: int, config: GenerationConfig) -> list[int]:
    """A fresh block on these logits alone, one position a step."""
    state: dict[int, int] = {}
    for _ in range(LENGTH):
        revealed = sum(1 << i for i in state)
        drawn = {i: draw(logits[i], config, start + i, revealed) for i in range(LENGTH) if i not in state}
        sure = {i: log_odds(logits[i] / config.temperature, token) for i, token in drawn.items()}
        best = min(drawn) if config.strategy == "sequential" else max(drawn, key=sure.__getitem__)
        state[best] = drawn[best]
    return [state[i] for i in range(LENGTH)]


@pytest.mark.parametrize("strategy", ["sequential", "low_confidence_static"])
@pytest.mark.parametrize("settings", [{}, {"top_k": 4}, {"top_p": 0.6}], ids=str)
def test_with_noise_a_proposal_is_drawn_as_the_target_would_draw_it(target, draft, strategy, settings):
    settings = {"temperature": 0.9, "seed": 11, "strategy": strategy} | settings
    shape = shape_of(1, noise=True, filters=("top_k" in settings, "top_p" in settings))
    batch = opened(target, draft, shape, **settings)
    by_model(batch, shape)
    prompt = PROMPTS[1]
    logits = plain_logits(draft, prompt + [MASK] * LENGTH)
    assert proposal(batch, 1) == [replay_noise(logits, len(prompt), GenerationConfig(**settings))]
    kept = batch.slots.draft_logits[1, 0]
    torch.testing.assert_close(kept[:, :MASK], logits[:, :MASK], rtol=1e-4, atol=1e-4)


def test_a_draft_that_lags_behind_by_more_than_there_are_rows_for_is_not_asked(target, draft):
    shape = shape_of(2, draft_pending=1)
    batch = opened(target, draft, shape, prompts=[list(range(1, 17))] * 3)
    batch.slots.draft_kv_len.copy_(torch.tensor([16, 12, 8]))
    by_model(batch, shape)
    assert batch.slots.proposal_depth.tolist() == [2, 2, 0]
    assert batch.slots.draft_kv_len.tolist() == [20, 20, 8] and batch.slots.draft_forwards.tolist() == [2, 2, 0]
    assert proposal(batch, 0) == proposal(batch, 1)  # what waited came along


def test_a_draft_stops_behind_a_block_in_which_it_ended_the_text(target, draft):
    shape = shape_of(3)
    batch = opened(target, draft, shape)
    by_model(batch, shape)
    free = [proposal(batch, slot) for slot in range(3)]
    late = [token for first, second, _ in free for token in second if token not in first]
    end = next(token for token in late if all(token not in prompt for prompt in PROMPTS))
    depths = [next((k + 1 for k, block in enumerate(blocks) if end in block), 3) for blocks in free]
    batch = opened(target, draft, shape, end_token_ids=(end,))
    by_model(batch, shape)
    assert 2 in depths
    assert [proposal(batch, slot) for slot in range(3)] == [blocks[:n] for blocks, n in zip(free, depths, strict=True)]
    assert batch.slots.draft_end.tolist() == [
        n if end in blocks[n - 1] else NO_END for blocks, n in zip(free, depths, strict=True)
    ]


def test_nobody_drafts_beyond_what_may_be_decoded_or_was_asked_for(target, draft):
    shape = shape_of(3)
    batch = opened(target, draft, shape, new=5)  # to position 7, 9 and 12: two, two and two blocks
    by_model(batch, shape, depth=[3, 1, 3], runs=[1, 1, 0])
    assert batch.slots.proposal_depth.tolist() == [2, 1, 0]
    assert batch.slots.draft_forwards.tolist() == [2, 1, 0]


def test_a_standing_proposal_is_kept_and_gone_on_from(target, draft):
    shape = shape_of(3)
    batch, whole = (opened(target, draft, shape) for _ in range(2))
    by_model(whole, shape)
    by_model(batch, shape, depth=[2, 2, 2])
    kept = {name: getattr(batch.slots, name)[:, :2] for name in ("draft_tokens", "draft_prob", "draft_log_odds")}
    before = {name: x.clone() for name, x in kept.items()}
    by_model(batch, shape, depth=[3, 3, 2])
    assert all(torch.equal(x, before[name]) for name, x in kept.items())
    assert batch.slots.proposal_depth.tolist() == [3, 3, 2] and batch.slots.draft_forwards.tolist() == [3, 3, 2]
    assert proposal(batch, 1) == proposal(whole, 1)


def with_last_logits(target, draft, shape: Shape, **settings) -> Batch:
    """The target has seen the current blocks; then slot 1 has had a step that revealed its position 2 as token 40."""
    batch = opened(target, draft, shape, **settings)
    slots = batch.slots
    with torch.inference_mode():
        logits, rows = drafting.state_logits(slots, batch.target, slots.start, slots.revealed, slots.step, shape)
    batch.target.keep_logits(logits)
    slots.last_rows.copy_(rows)
    slots.text[1, 6], slots.revealed[1], slots.step[1], slots.last_rows[1, 2] = 40, 0b0100, 1, -1
    return batch


@torch.inference_mode()
def from_last_logits(batch: Batch, shape: Shape, **commands) -> None:
    command(batch, shape, **commands)
    drafting.from_last_logits(batch.slots, batch.commands, batch.target, shape)


def test_the_target_proposes_what_its_last_logits_say_of_masked_positions(target, draft):
    shape = shape_of(1, self_draft=True, keeps_logits=True)
    batch = with_last_logits(target, draft, shape)
    from_last_logits(batch, shape, mode=[SELF_DRAFT] * 3)
    for slot, prompt in enumerate(PROMPTS):
        known = len(prompt) % LENGTH
        best = plain_logits(target, prompt + [MASK] * (LENGTH - known)).argmax(1).tolist()
        expected = (prompt[-known:] if known else []) + best[known:]
        if slot == 1:
            expected[2] = 40
        assert proposal(batch, slot) == [expected]
    assert batch.slots.draft_sharpness[:, 0].tolist() == [1.0] * 3
    assert batch.slots.draft_forwards.tolist() == [0] * 3


def test_the_target_s_own_proposal_replaces_one_that_stands(target, draft):
    shape = shape_of(2, self_draft=True, keeps_logits=True)
    batch = with_last_logits(target, draft, shape)
    by_model(batch, shape)
    from_last_logits(batch, shape, mode=[SELF_DRAFT, MODEL_DRAFT, MODEL_DRAFT])
    assert batch.slots.proposal_depth.tolist() == [1, 2, 2]
    assert batch.slots.draft_sharpness[:, 0].tolist() == [1.0, 0.25, 0.25]


def test_where_the_proposal_that_it_replaces_ended_the_text_is_forgotten(target, draft):
    """Else the block behind would never be among the rows."""
    shape = shape_of(2, self_draft=True, keeps_logits=True)
    batch = with_last_logits(target, draft, shape)
    batch.slots.draft_end.fill_(1)
    from_last_logits(batch, shape, mode=[SELF_DRAFT, SELF_DRAFT, MODEL_DRAFT])
    assert batch.slots.draft_end.tolist() == [NO_END, NO_END, 1]


@pytest.mark.parametrize("why", ["it was not asked", "it does not run", "nothing is known of it"])
def test_the_target_drafts_for_no_slot_but_those_that_it_should(target, draft, why):
    shape = shape_of(1, self_draft=True, keeps_logits=True)
    batch = with_last_logits(target, draft, shape)
    commands = {"mode": [SELF_DRAFT] * 3, "runs": [1] * 3}
    match why:
        case "it was not asked":
            commands["mode"] = [SELF_DRAFT, MODEL_DRAFT, SELF_DRAFT]
        case "it does not run":
            commands["runs"] = [1, 0, 1]
        case "nothing is known of it":
            batch.slots.last_rows[1] = -1
    text, tokens = batch.slots.text[1].clone(), batch.slots.draft_tokens[1].clone()
    from_last_logits(batch, shape, **commands)
    assert batch.slots.proposal_depth.tolist() == [1, 0, 1]
    assert torch.equal(batch.slots.text[1], text) and torch.equal(batch.slots.draft_tokens[1], tokens)


def test_the_target_s_own_proposal_with_noise_is_drawn_from_its_last_logits(target, draft):
    settings = {"temperature": 0.9, "seed": 11, "strategy": "sequential"}
    shape = shape_of(1, self_draft=True, keeps_logits=True, noise=True)
    batch = with_last_logits(target, draft, shape, **settings)
    from_last_logits(batch, shape, mode=[SELF_DRAFT] * 3)
    logits = plain_logits(target, PROMPTS[1] + [MASK] * LENGTH)
    drawn = [draw(logits[i], GenerationConfig(**settings), 4 + i, 0) for i in range(LENGTH)]
    assert proposal(batch, 1) == [[*drawn[:2], 40, drawn[3]]]
