"""Exact decoding against native decoding: the quick selection of exactness.py (benchmarks), and settings at random."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks import contest, report
from benchmarks.cpu import exactness, exactness_mixed, exactness_settings
from benchmarks.cpu.exactness_mixed import MIXED
from benchmarks.cpu.exactness_settings import (
    FACTORS,
    LONG,
    LONG_FACTORS,
    NEAR,
    ONE_FACTOR,
    PAIRWISE,
    RANDOM,
    UNLIKE,
    UNPROMISED,
)
from simsd import Decoder, GenerationConfig
from simsd.config import DRAFTERS, STRATEGIES, VERIFIERS, SamplingParams
from simsd.decode import iteration
from simsd.decode.slots import Slots
from simsd.models import families
from simsd.order.head import OrderHead, order_head_for, save_order_head
from simsd_kernels import INF

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD = "one of the heads"
QUICK = exactness.every_setting(quick=True)


@pytest.fixture(scope="module")
def outcomes():
    return exactness.compare_all(QUICK, exactness.Natives())


@pytest.mark.parametrize("group, least", [(ONE_FACTOR, 50), (PAIRWISE, 50), (LONG, 30), (RANDOM, 50), (MIXED, 50)])
def test_the_text_and_the_step_map_are_native_decodings(outcomes, group, least):
    chosen = [outcome for outcome in outcomes if outcome.setting.group == group]
    assert sum(outcome.comparisons for outcome in chosen) > least
    assert [str(found) for outcome in chosen for found in outcome.differences] == []


def test_the_probabilities_are_native_decodings_to_the_last_bit(outcomes):
    promised = [outcome for outcome in outcomes if outcome.setting.group != UNPROMISED]
    assert [outcome.setting.name for outcome in promised if outcome.probs_differ] == []


def test_the_comparisons_go_through_drafted_tokens(outcomes):
    """Equality without drafts would be native decoding compared with itself. How many there are is the policy's choice,
    which goes by measured times: bounds are wide."""
    built_in = exactness.totals(outcome for outcome in outcomes if outcome.setting.group == ONE_FACTOR)
    assert built_in["unproved"] < 0.1 * built_in["comparisons"]
    assert built_in["accepted"] > 0.3 * built_in["tokens"]
    assert built_in["forwards"] < 0.8 * built_in["native_forwards"]
    assert exactness.totals(outcome for outcome in outcomes if outcome.setting.group == RANDOM)["accepted"] > 500


def test_sequences_are_cancelled_on_their_way(outcomes):
    assert sum(outcome.cancelled for outcome in outcomes) >= 2


@pytest.mark.parametrize("factors", [FACTORS, LONG_FACTORS], ids=["tiny", "long"])
def test_every_pair_of_factor_values_is_among_the_settings(factors):
    names = list(factors)
    rows = exactness_settings.covering_array([len(values) for values in factors.values()])
    for a, b in itertools.combinations(range(len(names)), 2):
        pairs = {(row[a], row[b]) for row in rows}
        assert len(pairs) == len(factors[names[a]]) * len(factors[names[b]]), (names[a], names[b])


def test_long_blocks_are_drafted_with_an_order_head():
    target = exactness_settings.model("long-target")
    assert all(order_head_for(target, "auto", length) for length in LONG_FACTORS["block_length"])


def test_every_family_is_among_the_settings_and_drafts_predict_as_their_targets_and_otherwise():
    shapes = [shape for shape in exactness_settings.SHAPES.values() if shape.deterministic]
    named = {family.name for family in families.FAMILIES if family.architecture is None}
    assert {shape.family for shape in shapes} == named
    pairs = {(shape.shift, shape.other_shift) for shape in shapes}
    assert pairs == {(False, False), (False, True), (True, False), (True, True)}
    mixed = {
        exactness_settings.SHAPES[mix.target].shift for mix in QUICK if mix.group == MIXED and "/" in (mix.draft or "")
    }
    assert mixed == {False, True}


def test_a_full_run_has_ten_thousand_comparisons_of_distinct_settings():
    full = exactness.every_setting()
    assert sum(len(setting.numbers) for setting in full if setting.group != UNPROMISED) > 10_000
    assert len({(setting.group, setting.name) for setting in full}) == len(full)
    assert {setting.group for setting in full} == {setting.group for setting in QUICK}


@pytest.mark.parametrize("what", ["token", "step", "end"])
def test_a_change_of_the_text_is_found_and_placed(what):
    native = exactness.Natives()("block 4", 0, GenerationConfig(max_new_tokens=12), 0)
    at = 7
    changed = {
        "token": {"tokens": [*native.tokens[:at], native.tokens[at] + 1, *native.tokens[at + 1 :]]},
        "step": {"step_map": [*native.step_map[:at], native.step_map[at] + 1, *native.step_map[at + 1 :]]},
        "end": {"finish_reason": "failed"},
    }[what]
    found = exactness.difference("s", 3, native, dataclasses.replace(native, **changed), cancelled=True)
    assert (found.what, found.prompt, found.position) == (what, 3, len(native.tokens) if what == "end" else at)


def test_a_missing_token_is_a_difference_unless_the_sequence_was_to_be_cancelled():
    native = exactness.Natives()("block 4", 0, GenerationConfig(max_new_tokens=12), 0)
    shorter = dataclasses.replace(native, tokens=native.tokens[:5], step_map=native.step_map[:5])
    cancelled = dataclasses.replace(shorter, finish_reason="cancelled")
    assert exactness.difference("s", 0, native, shorter, cancelled=True).position == 5
    assert exactness.difference("s", 0, native, cancelled, cancelled=False).position == 5
    assert exactness.difference("s", 0, native, cancelled, cancelled=True) is None


def test_a_difference_fails_the_benchmark_and_is_in_its_tables(monkeypatch):
    """The texts of another seed stand in for wrong ones."""
    monkeypatch.setattr(exactness, "native_config", native_of_another_seed)
    made = contest.Bench()
    with pytest.raises(RuntimeError, match="texts differ"):
        exactness.run(made, "quick", "T = 3: near draft, low")
    assert "Differences:" in report.tables_of(made.state())
    monkeypatch.undo()
    made = contest.Bench()
    exactness.run(made, "quick", "T = 3: near draft, low")
    assert "Differences:" not in report.tables_of(made.state()) and made.notes[0].startswith("2 comparisons")
    with pytest.raises(ValueError, match="selection must be one of full, quick, got 'all'"):
        exactness.run(made, "all", "")


def test_states_that_see_each_other_are_found_out(monkeypatch):
    """What separates the states of a block is their keys' death; without it, logits are near enough to look right."""
    right = iteration.plan_states

    def immortal(*arguments):
        plan = right(*arguments)
        return plan._replace(death=torch.full_like(plan.death, INF))

    monkeypatch.setattr(iteration, "plan_states", immortal)
    setting = next(s for s in exactness_settings.settings() if s.name.startswith("block 4: near draft, batch 1"))
    outcome = exactness.compare(dataclasses.replace(setting, numbers=tuple(range(10))), exactness.Natives())
    assert outcome.probs_differ == 10 and len(outcome.differences) > 3
    assert outcome.differences[0].native != outcome.differences[0].exact


@pytest.fixture
def mix():
    return next(mix for mix in exactness_mixed.mixes() if (mix.target, mix.batch) == ("block 4", 3))


def test_requests_of_mixed_batches_differ_in_every_setting():
    """Stop strings need a tokenizer, which only the built-in target has."""
    mixes = exactness_mixed.mixes()
    assert sum(len(mix.numbers) for mix in mixes) > 2000
    configs = [job.config for job in exactness_mixed.jobs(mixes[0])]
    for field in dataclasses.fields(SamplingParams):
        assert len({getattr(config, field.name) for config in configs}) > 1, field.name
    for name, values in (("strategy", STRATEGIES), ("verify", VERIFIERS), ("drafter", DRAFTERS)):
        assert {getattr(config, name) for config in configs} == set(values)
    assert {mix.batch for mix in mixes} == {3, 6, 8, 32}


def test_requests_of_mixed_batches_are_cancelled_before_they_run_and_on_their_way(mix):
    results = [result for _, result in exactness_mixed.decode_mix(mix)]
    assert len(results) == len(mix.numbers)
    assert {bool(result.tokens) for result in results if result.finish_reason == "cancelled"} == {True, False}


def test_temporal_requests_of_mixed_batches_are_compared_but_not_counted(outcomes):
    mixed = exactness.totals(outcome for outcome in outcomes if outcome.setting.group == MIXED)
    requests = sum(len(setting.numbers) for setting in QUICK if setting.group == MIXED)
    assert mixed["temporal"] > 0
    assert mixed["comparisons"] + mixed["unproved"] <= requests - mixed["temporal"]


def test_settings_left_by_an_earlier_request_are_found_out(monkeypatch, mix):
    right = Slots.open

    def stale(slots, slot, tokens, settings, *more):
        earlier = {"seed": int(slots.seed[slot])} if slots.end[slot] > 0 else {}
        right(slots, slot, tokens, settings | earlier, *more)

    monkeypatch.setattr(Slots, "open", stale)
    outcome = exactness.compare(mix, exactness.Natives())
    assert len(outcome.differences) > 3


def native_of_another_seed(config: GenerationConfig, seed: int) -> GenerationConfig:
    return dataclasses.replace(config, verify="none", seed=seed + 1)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A file by block length of a head that knows nothing of the model, and says much."""
    torch.manual_seed(0)
    files = {}
    for length in (1, 2, 3, 4, 5, 8):
        head = OrderHead(length)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        files[length] = tmp_path_factory.mktemp("heads") / f"{length}.safetensors"
        save_order_head(head, files[length], exactness_settings.model("block 4"), {})
    return files


@st.composite
def cases(draw) -> tuple[str | None, GenerationConfig, list[list[int]], list[int], int]:
    length = draw(st.sampled_from((1, 2, 3, 4, 5, 8)))
    draft = draw(st.sampled_from((NEAR, NEAR, UNLIKE, None)))
    strategy, steps = draw(st.sampled_from(STRATEGIES)), draw(st.none() | st.integers(1, length))
    sub_blocks = exactness_settings.sub_block_lengths(length, steps, strategy)
    config = GenerationConfig(
        max_new_tokens=draw(st.integers(1, 20)),
        block_length=length,
        steps=steps,
        sub_block_length=draw(st.none() | st.sampled_from(sub_blocks)),
        strategy=strategy,
        threshold=draw(st.sampled_from((0.0, 0.3, 0.85, 1.0))),
        entropy_bound=draw(st.sampled_from((0.0, 0.5, 3.0))),
        temperature=draw(st.sampled_from((0.0, 0.3, 1.0))),
        top_k=draw(st.sampled_from((0, 1, 5))),
        top_p=draw(st.sampled_from((1.0, 0.9, 0.3))),
        drafter=draw(st.sampled_from(("auto", "self", "lookup") if draft is None else DRAFTERS)),
        lookahead=draw(st.integers(1, 4)),
        max_rows=draw(st.sampled_from((None, 0, 1, 8, 40, 200))),
        order_sharpness=draw(st.sampled_from((0.0, 0.5, 8.0))),
        draft_steps=draw(st.none() | st.integers(1, length)),
        end_token_ids=draw(st.sampled_from((None, (), (3, 17, 40)))),
        order_head=draw(st.sampled_from(("none", HEAD))),
    )
    token = st.integers(1, exactness_settings.END - 1)
    prompts = draw(st.lists(st.lists(token, min_size=1, max_size=11), min_size=1, max_size=5))
    seeds = draw(st.lists(st.integers(-5, 5), min_size=len(prompts), max_size=len(prompts)))
    return draft, config, prompts, seeds, draw(st.integers(1, 4))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_any_setting_gives_the_native_text(heads, case):
    draft, config, prompts, seeds, batch = case
    if config.order_head == HEAD:
        config = dataclasses.replace(config, order_head=heads[config.block_length])
    target = exactness_settings.model("block 4")
    draft = None if draft is None else exactness_settings.model(f"block 4/{draft}")
    exact = exactness.decode(Decoder(target, prompts, draft, config, seeds=seeds, max_batch=batch))
    for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        native = exactness.decode(Decoder(target, [prompt], None, exactness.native_config(config, seed)))[0]
        assert exactness.difference("", number, native, exact[number], cancelled=False) is None
        assert exact[number].probs == native.probs
