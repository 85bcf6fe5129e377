"""Native and exact decoding against slow replays, in batches, and what one iteration leaves alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import simsd
from recorded import Batch, fill, request
from replays import PROMPTS, STRATEGIES, replay_native
from simsd import GenerationConfig
from simsd.decode.exchange import MODEL_DRAFT, SELF_DRAFT, UNDRAFTED
from simsd.decode.iteration import Parts, Shape, run_plan
from simsd.decode.temporal import Temporal, draft_blocks
from stand_ins import MASK, disturbed, random_sdar

DRAFTERS = ["none", "self", "model", "auto"]


@pytest.fixture(scope="module")
def close_draft():
    return disturbed(random_sdar(0))


def settings_for(drafter: str, **changes) -> GenerationConfig:
    mode = {"verify": "none"} if drafter == "none" else {"drafter": drafter}
    return GenerationConfig(**{"max_new_tokens": 11} | mode | changes)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", STRATEGIES, ids=lambda s: s["strategy"])
def test_the_text_equals_a_replay_without_cache(target, close_draft, drafter, steps, rule):
    config = settings_for(drafter, steps=steps, **rule)
    results = simsd.generate(target, PROMPTS, close_draft, config, max_batch=3)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert (result.tokens, result.step_map) == replay_native(target, prompt, config)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("rule", STRATEGIES, ids=lambda s: s["strategy"])
@pytest.mark.parametrize("sampling", [{"top_k": 5}, {"top_p": 0.7}, {}], ids=["top_k", "top_p", "plain"])
def test_sampled_text_equals_a_replay_without_cache(target, close_draft, drafter, rule, sampling):
    config = settings_for(drafter, max_new_tokens=13, temperature=0.9, seed=17, **rule, **sampling)
    result = simsd.generate(target, [PROMPTS[2]], close_draft, config)[0]
    assert (result.tokens, result.step_map) == replay_native(target, PROMPTS[2], config)


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("rule", STRATEGIES, ids=lambda s: s["strategy"])
@pytest.mark.parametrize("sub_block_length", [1, 2, 3])
def test_text_by_sub_blocks_equals_a_replay_without_cache(target, close_draft, drafter, rule, sub_block_length):
    for sampling in ({}, {"temperature": 0.9, "seed": 17, "top_k": 5}):
        config = settings_for(drafter, sub_block_length=sub_block_length, **rule, **sampling)
        results = simsd.generate(target, PROMPTS[:3], close_draft, config, max_batch=3)
        for prompt, result in zip(PROMPTS[:3], results, strict=True):
            assert (result.tokens, result.step_map) == replay_native(target, prompt, config)


@pytest.mark.parametrize("drafter", ["none", "model"])
@pytest.mark.parametrize("steps", [2, 3, 4])
@pytest.mark.parametrize("rule", STRATEGIES, ids=lambda s: s["strategy"])
def test_a_sub_block_is_full_before_the_next_one_is_begun(target, close_draft, drafter, rule, steps):
    steps = None if rule["strategy"] == "entropy_bounded" else steps
    config = settings_for(drafter, sub_block_length=2, steps=steps, end_token_ids=(), **rule)
    for result in simsd.generate(target, PROMPTS, close_draft, config, max_batch=3):
        begin = -len(result.prompt_tokens) % 4
        for first in range(begin, len(result.step_map) - 3, 4):
            taken = result.step_map[first : first + 4]
            assert max(taken[:2]) < min(taken[2:])


@pytest.mark.parametrize("drafter", ["self", "model", "auto"])
def test_drafts_are_accepted_and_save_forwards(target, close_draft, drafter):
    # Rows are given: without, how many states a forward sees goes by measured times.
    config = settings_for(drafter, max_new_tokens=40, end_token_ids=(), max_rows=200)
    native = simsd.generate(target, PROMPTS, config=settings_for("none", max_new_tokens=40, end_token_ids=()))
    exact = simsd.generate(target, PROMPTS, close_draft, config)
    assert [r.tokens for r in exact] == [r.tokens for r in native]
    assert [r.probs for r in exact] == [r.probs for r in native]
    forwards = [sum(r.stats.target_forwards for r in results) for results in (exact, native)]
    if drafter == "auto":  # by measured times it may find that a draft does not pay for such a small model
        assert forwards[0] <= forwards[1]
        return
    assert forwards[0] < 0.9 * forwards[1]
    assert sum(r.stats.accepted for r in exact) > 0
    assert {"denoised", "drafted"} == {origin for r in exact for origin in r.origins}


def test_a_draft_that_is_the_target_takes_all_steps_of_its_lookahead_at_once(target):
    changes = {"draft_steps": 4, "lookahead": 3, "max_rows": 200, "order_sharpness": 1e3}
    config = settings_for("model", max_new_tokens=24, end_token_ids=(), **changes)
    result = simsd.generate(target, [PROMPTS[3]], random_sdar(0), config)[0]
    assert result.stats.acceptance == 1.0
    assert result.stats.target_forwards == 2  # six blocks


def test_rows_are_budgeted_over_the_batch(target, close_draft):
    seen = []

    def counting(*call):
        runner, plan, *_ = call
        current = 4 * int((plan.block[:, 0] >= 0).sum())
        drafted = int(plan.draft_blocks_in_rows.sum()) * 4
        seen.append(int((plan.slots >= runner.scratch).sum()) + drafted - current)
        return run_plan(*call)

    config = settings_for("model", max_new_tokens=20, max_rows=24)
    for _ in simsd.Decoder(target, PROMPTS, close_draft, config, parts=Parts(forward=counting)):
        pass
    assert max(seen) <= 24 and max(seen) > 8


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_prompt_s_text_does_not_depend_on_its_batch(target, close_draft, drafter, size):
    config = settings_for(drafter, max_new_tokens=13, temperature=0.7, seed=[1, 2, 3, 4, 5])
    together = simsd.generate(target, PROMPTS, close_draft, config, max_batch=size)
    for prompt, seed, result in zip(PROMPTS, config.seed, together, strict=True):
        alone_config = settings_for("none", max_new_tokens=13, temperature=0.7, seed=seed)
        alone = simsd.generate(target, [prompt], config=alone_config)[0]
        assert (result.tokens, result.step_map, result.probs) == (alone.tokens, alone.step_map, alone.probs)


@pytest.mark.parametrize("verify", ["none", "exact", "temporal"])
def test_a_device_that_runs_every_row_gives_the_same_text(target, close_draft, verify):
    config = GenerationConfig(verify=verify, max_new_tokens=13, temperature=0.7, max_rows=40, max_batch=3)
    packed = simsd.generate(target, PROMPTS, close_draft, config)
    whole = simsd.Decoder(target, PROMPTS, close_draft, config, parts=Parts(packed=False), prefill_rows=64)
    for _ in whole:
        pass
    assert [r.tokens for r in whole.results()] == [r.tokens for r in packed]
    assert [r.probs for r in whole.results()] == [r.probs for r in packed]


SHAPES = {
    "greedy": Shape(lookahead=2, states=6, logits_rows=72, draft_blocks=2, self_draft=True, keeps_logits=True),
    "noise": Shape(lookahead=2, states=6, logits_rows=72, draft_blocks=2, draft_steps=2, noise=True),
    "temporal": Shape(lookahead=1, draft_steps=4, temporal=Temporal("match", "draft_argmax")),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def batch_of(target, draft, shape: Shape, packed: bool = False) -> Batch:
    """Three requests whose prompts are in place; all run, drafted for by the draft model."""
    batch = Batch(target, draft, [shape], 3, 64, packed)
    settings = {"max_new_tokens": 24, "end_token_ids": ()}
    settings |= {"temperature": 0.8, "seed": 9} if shape.noise else {}
    for slot, prompt in enumerate(PROMPTS[:3]):
        batch.open(slot, slot + 1, request(slot, target, prompt, **settings))
    fill(batch, shape)
    for runner in (batch.target, batch.draft):  # memory that nothing was stored to may hold NaN
        runner.cache.keys.nan_to_num_()
        runner.cache.values.nan_to_num_()
    command(batch)
    return batch


def command(batch: Batch, **commands) -> None:
    one = {
        "runs": 1,
        "mode": MODEL_DRAFT,
        "depth": 2,
        "peeks": 0,
        "head": 1,
        "calibration": 1.0,
        "min_visit_prob": 0.0,
        "row_budget": 60,
    }
    batch.commands.write(**{name: [value] * 3 for name, value in one.items()} | commands)


def held(batch: Batch, slot: int) -> dict[str, torch.Tensor]:
    """All that a slot has: fields, proposal, keys and values."""
    slots = batch.slots
    tensors = {name: x for name, x in vars(slots).items() if isinstance(x, torch.Tensor) and len(x) == slots.count}
    for side in ("target", "draft"):
        for kind, layers in zip(("keys", "values"), getattr(batch, side).cache.stored(), strict=True):
            tensors |= {f"{side} {kind} {n}": x for n, x in enumerate(layers)}
    return {name: x[slot].clone() for name, x in tensors.items()}


def told(batch: Batch, shape: Shape) -> list:
    return list(batch.report.of(shape.lookahead).read(partly=shape.temporal is not None))


@each_shape
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "static"])
def test_a_slot_that_does_not_run_keeps_every_bit(target, close_draft, shape, packed):
    batch = batch_of(target, close_draft, shape, packed)
    for _ in range(2):  # it is in the middle of something then
        batch.iterate(shape)
    before = held(batch, 1)
    command(batch, runs=[1, 0, 1])
    batch.iterate(shape)
    assert [slot for slot, _ in told(batch, shape)] == [0, 2]
    after = held(batch, 1)
    # Rows of the target's last logits: they are others' now.
    if shape.keeps_logits:
        assert (after.pop("last_rows") == -1).all() and (after.pop("seen_revealed") == -1).all()
    others = "last_rows", "seen_rows", "seen_tokens", "seen_block", "seen_exact"
    after = {name: x for name, x in after.items() if name not in others}
    assert [name for name, x in after.items() if not torch.equal(x, before[name])] == []


@each_shape
def test_rows_that_are_packed_away_change_nothing_that_is_told(target, close_draft, shape):
    batches = [batch_of(target, close_draft, shape, packed) for packed in (True, False)]
    for n in range(5):
        reports = []
        for batch in batches:
            command(batch, runs=[1, n % 2, int(n != 3)], mode=[SELF_DRAFT if n > 2 else MODEL_DRAFT] * 3)
            batch.iterate(shape)
            reports.append(told(batch, shape))
        assert reports[0] == reports[1] and reports[0]
    for slot in range(3):
        one, other = (held(batch, slot) for batch in batches)
        length = int(one["start"])
        assert length > 0 and torch.equal(one["text"][:length], other["text"][:length])
        for name in ("start", "revealed", "step", "step_map", "prob", "target_kv_len", "draft_kv_len", "draft_tokens"):
            assert torch.equal(one[name], other[name]), name


def test_a_forward_of_one_s_own_decides_the_text(target):
    """One whose every logit speaks for token 7."""

    def sevens(runner, plan, slots, shape):
        logits = run_plan(runner, plan, slots, shape)
        return torch.nn.functional.one_hot(torch.full((len(logits),), 7), logits.shape[1]).to(logits.dtype) * 9

    decoder = simsd.Decoder(target, PROMPTS[:2], max_new_tokens=6, parts=Parts(forward=sevens))
    list(decoder)
    assert [result.tokens for result in decoder.results()] == [[7] * 6] * 2


def test_a_proposer_of_one_s_own_is_believed_as_far_as_the_target_agrees(target, close_draft):
    """It knows the text of the first of two requests, and is wrong about the other."""
    shape = Shape(lookahead=1, states=6, logits_rows=72, draft_blocks=1)
    native = [r.tokens for r in simsd.generate(target, PROMPTS[:2], verify="none", max_new_tokens=8, end_token_ids=())]

    def knows(slots, commands, draft, shape):
        for slot, (prompt, text) in enumerate(zip(PROMPTS, native, strict=False)):
            block = torch.tensor((prompt + text)[:4])
            slots.draft_tokens[slot, 0] = block if slot == 0 else (block + 1) % 60
        slots.proposal_depth.fill_(1)
        slots.draft_prob[:, 0], slots.draft_log_odds[:, 0] = 0.9, torch.tensor([4.0, 3.0, 2.0, 1.0])

    batch = batch_of(target, close_draft, shape)
    command(batch, runs=[1, 1, 0])
    batch.iterate(shape, Parts(proposer=knows))
    (_, right), (_, wrong) = told(batch, shape)
    # Two positions were masked; the step behind them is the next block's first.
    assert (right.judged, right.accepted, right.taken) == (2, 2, 3)
    assert right.blocks[0].tokens == PROMPTS[0] + native[0][:2]
    assert (wrong.judged, wrong.accepted, wrong.taken, wrong.blocks) == (1, 0, 1, [])
    shown = zip(wrong.provisional, PROMPTS[1] + native[1], strict=False)
    assert all(token in (None, own) for token, own in shown)


def test_a_drafter_of_one_s_own_is_judged_as_the_draft_model_is(target, close_draft):
    """Blocks of which nothing was drafted: every token is the target's."""
    shape = SHAPES["temporal"]

    def nothing(slots, commands, draft, shape):
        drafts = draft_blocks(slots, commands, draft, shape)
        known = slots.bits_in(slots.revealed)
        tokens = torch.where(known, drafts.tokens, MASK)
        return dataclasses.replace(
            drafts, tokens=tokens, revealed=slots.revealed.clone(), step_map=torch.zeros_like(drafts.step_map)
        )

    batch = batch_of(target, close_draft, shape)
    batch.iterate(shape, Parts(drafter=nothing))
    for slot, report in told(batch, shape):
        known = len(PROMPTS[slot]) % 4
        assert (report.judged, len(report.blocks[0].tokens)) == (0, 4)
        assert report.blocks[0].origins[known:] == [UNDRAFTED] * (4 - known)
