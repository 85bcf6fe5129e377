"""The audit: it passes what is right, and fails what is broken for the right reason."""

from __future__ import annotations

import pytest
import torch

import simsd
import simsd_kernels
from simsd import audit
from simsd.audit import chi_squared, context, distribution, equality, leak
from simsd.audit.forwards import plain_logits
from simsd.audit.report import FAIL, INCONCLUSIVE, PASS, REPORTED, Settings, Subject
from simsd.decode import iteration
from simsd.decode.rows import STRIDE
from simsd.decode.slots import Slots
from simsd.errors import SimsdError
from simsd.models.families.sdar import SDARMoeConfig, SDARMoeForCausalLM
from simsd.models.runner import ModelRunner
from simsd.results import Result, Stats
from small_checkpoints import BASE, MOE
from stand_ins import MASK, disturbed, random_sdar

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[5, 9, 2, 40, 33], [7, 7, 1, 50, 12, 3, 22, 8, 19], [44, 2, 30]]
SMALL = {"strategies": ("low_confidence_static",), "max_new_tokens": 12, "batch": 3, "blocks": 2, "seeds": 600}


@pytest.fixture(scope="module")
def soft_target():
    """Not sure of anything, so that its texts vary."""
    return random_sdar(0, sharpness=0.5)


@pytest.fixture(scope="module")
def soft_draft():
    return disturbed(random_sdar(0, sharpness=0.5))


def subject_of(target, draft=None, prompts=PROMPTS, **changes) -> Subject:
    return Subject(target, draft, prompts, Settings(**SMALL | changes))


def only(checks, part, verify) -> audit.Check:
    found = [check for check in checks if (check.part, check.verify) == (part, verify)]
    assert len(found) == 1
    return found[0]


# The whole


@pytest.mark.parametrize("drafter", ["self", "model"])
@pytest.mark.parametrize("shift", [False, True], ids=["", "shifted"])
def test_a_sound_decoder_passes_and_temporal_is_only_reported(soft_draft, drafter, shift):
    """The draft's rows predict their own positions, whatever the target's do."""
    soft_target = random_sdar(0, sharpness=0.5, shift=shift)
    report = audit.run(soft_target, soft_draft if drafter == "model" else None, PROMPTS, Settings(**SMALL))
    assert report.passed and report.complete
    for check in report.checks:
        assert check.result == (PASS if check.verify == "exact" else REPORTED), check
    assert {check.part for check in report.checks} == {"equality", "leak", "context", "distribution"}
    assert only(report.checks, "leak", "exact").figures["max"] == 0
    assert only(report.checks, "leak", "temporal").figures["max"] > 0
    assert only(report.checks, "context", "temporal").figures["max"] > 0


def test_the_built_in_pair_passes():
    target, draft = simsd.load("tiny-target"), simsd.load("tiny-draft")
    settings = Settings(**SMALL | {"seeds": 400, "states": 40, "verify": "exact"})
    report = audit.run(target, draft, audit.default_prompts(1)[:2], settings)
    assert [check.result for check in report.checks] == [PASS] * len(report.checks)
    assert {check.verify for check in report.checks} == {"exact"}


def test_mixture_of_experts_models_can_be_audited():
    settings = BASE | MOE | {"block_length": 4, "mask_token_id": 0}
    torch.manual_seed(0)
    target = simsd.load(SDARMoeForCausalLM(SDARMoeConfig(**settings)).eval(), deterministic=True)
    subject = subject_of(target)
    assert equality.equality(subject, "exact", "low_confidence_static", 0.0).result == PASS
    assert leak.exact_leak(subject).result == PASS
    assert [check.result for check in context.exact_context(subject)] == [PASS, PASS]
    # As it comes, a row's rounding depends on which experts the others went to: no leak, but not exactly 0 either.
    as_it_comes = subject_of(simsd.load(SDARMoeForCausalLM(SDARMoeConfig(**settings)).eval()))
    leaked = leak.exact_leak(as_it_comes)
    assert leaked.result == (INCONCLUSIVE if leaked.figures["max"] else PASS) and leaked.figures["max"] < 1e-4
    assert FAIL not in [check.result for check in context.exact_context(as_it_comes)]


def test_stages_are_announced_before_they_run(target):
    seen = []
    settings = Settings(**SMALL | {"verify": "temporal", "seeds": 20, "temperature": 0.0})
    report = audit.run(target, None, PROMPTS[:1], settings, lambda stage: seen.append(stage.name))
    assert seen[0] == "equality, temporal, low_confidence_static" and "leak and context, temporal" in seen
    assert all(check.result in (REPORTED, INCONCLUSIVE) for check in report.checks)
    assert report.passed and "nothing that is required was shown" in report.upshot()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"verify": "none"}, "verify must be one of exact, temporal, both"),
        ({"strategies": ()}, "strategies must be named once each"),
        ({"strategies": ("sequential", "sequential")}, "once each"),
        ({"strategies": ("random",)}, "strategy must be one of"),
        ({"temperature": -1.0}, "temperature"),
        ({"seeds": 0}, "seeds must be an integer >= 1"),
        ({"batch": True}, "batch must be an integer"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(SimsdError, match=message):
        Settings(**changes)


def test_bad_prompts_are_refused_before_anything_is_decoded(target):
    with pytest.raises(SimsdError, match="at least one prompt"):
        audit.stages(target, None, [], Settings())
    with pytest.raises(SimsdError, match="positions"):
        audit.stages(target, None, [[1] * 600], Settings())


# (a) equality


def flawed_walk(monkeypatch, position: int) -> None:
    """Blocks that a forward with several states finishes get the next id at `position`."""
    right = iteration.walk_states

    def broken(slots, logits, plan, shape):
        walk = right(slots, logits, plan, shape)
        for slot in range(slots.count):
            if (plan.block[slot] >= 0).sum() > 1:
                done = int(walk.progress[slot, 0])
                walk.tokens[slot, :done, position] = (walk.tokens[slot, :done, position] + 1) % 60
        return walk

    monkeypatch.setattr(iteration, "walk_states", broken)


def test_a_wrong_walk_fails_equality_with_the_first_difference(target, draft, monkeypatch):
    flawed_walk(monkeypatch, position=2)
    subject = subject_of(target, draft)
    check = equality.equality(subject, "exact", "low_confidence_static", 0.0)
    assert check.result == FAIL and check.figures["equal"] < check.figures["texts"]
    config = simsd.GenerationConfig(max_new_tokens=12, max_rows=256, drafter="model")
    native = simsd.generate(target, PROMPTS, config=simsd.GenerationConfig(max_new_tokens=12, verify="none"))
    broken = simsd.generate(target, PROMPTS, draft, config, max_batch=1)
    found = {d["prompt"]: d for d in check.details if d["how"] == "drafter model, batch 1"}
    assert found
    for number, (right, wrong) in enumerate(zip(native, broken, strict=True)):
        differing = [i for i, pair in enumerate(zip(right.tokens, wrong.tokens, strict=False)) if pair[0] != pair[1]]
        if not differing:
            assert number not in found
            continue
        at, difference = differing[0], found[number]
        assert (difference["token"], difference["position"]) == (at, 2)
        assert difference["block"] == (len(PROMPTS[number]) + at) // 4
        assert difference["native_token"] == right.tokens[at]
        assert difference["other_token"] == (right.tokens[at] + 1) % 60
        assert difference["margin_native_context"] > 0  # native took the argmax there


def test_margins_come_from_the_contexts_just_before_the_reveal(target):
    native = result_of([1, 2], [10, 11, 12, 13, 14, 15], [2, 1, 2, 1, 3, 4])
    other = result_of([1, 2], [10, 11, 20, 13, 14, 15], [2, 1, 4, 1, 2, 3])
    found = equality.first_difference(target, native, other)
    # Block 1 holds tokens 2 to 5. Of its differences number 2 is the earliest: native revealed it at step 2.
    assert (found["token"], found["block"], found["position"]) == (2, 1, 0)
    assert (found["native_token"], found["other_token"]) == (12, 20)
    assert (found["native_step"], found["other_step"]) == (2, 4)
    prefix = [1, 2, 10, 11]
    logits = plain_logits(target, prefix, [[MASK, 13, MASK, MASK], [MASK, 13, 14, 15]])[:, 0]
    margins = (logits[:, 12] - logits[:, 20]).tolist()
    assert [found["margin_native_context"], found["margin_other_context"]] == pytest.approx(margins, abs=1e-4)


def test_a_difference_in_order_alone_is_found_where_steps_count(target):
    native = result_of([1, 2, 3, 4], [10, 11, 12, 13], [1, 2, 3, 4])
    other = result_of([1, 2, 3, 4], [10, 11, 12, 13], [1, 3, 2, 4])
    assert equality.first_difference(target, native, native) is None
    found = equality.first_difference(target, native, other)
    assert (found["token"], found["native_step"], found["other_step"], found["margin_native_context"]) == (1, 2, 3, 0)
    assert equality.first_difference(target, native, other, with_steps=False) is None


def test_a_text_that_ends_early_differs_where_it_ends(target):
    native = result_of([1, 2, 3, 4], [10, 11, 12], [1, 2, 3])
    found = equality.first_difference(target, native, result_of([1, 2, 3, 4], [10, 11], [1, 2]))
    assert (found["token"], found["native_token"], found["other_token"]) == (2, 12, None)
    assert found["margin_native_context"] is None


def result_of(prompt: list[int], tokens: list[int], steps: list[int]) -> Result:
    return Result(tokens, None, steps, [1.0] * len(tokens), ["denoised"] * len(tokens), "length", prompt, Stats())


# (b) leak and (c) context


def visible_states(monkeypatch) -> None:
    """Every state sees every other state of its block."""
    right = iteration.plan_states

    def broken(slots, commands, target, shape):
        plan = right(slots, commands, target, shape)
        place = torch.arange(target.kv_slots)
        states = (place >= target.scratch) & (plan.birth < simsd_kernels.INF)
        birth = torch.where(states, plan.birth // STRIDE * STRIDE, plan.birth)
        death = torch.where(states, birth + STRIDE - 1, plan.death)
        return plan._replace(birth=birth.contiguous(), death=death.contiguous())

    monkeypatch.setattr(iteration, "plan_states", broken)


@pytest.mark.parametrize("shift", [False, True], ids=["", "shifted"])
def test_states_that_see_each_other_fail_leak_and_context(shift, monkeypatch):
    visible_states(monkeypatch)
    subject = subject_of(random_sdar(0, shift=shift), disturbed(random_sdar(0, shift=shift)))
    leaked = leak.exact_leak(subject)
    assert leaked.result == FAIL and leaked.figures["max"] > 0.01
    assert [check.result for check in context.exact_context(subject)] == [FAIL, FAIL]


def test_a_wrong_row_fails_the_context_of_a_model_that_shifts(monkeypatch):
    """The first position of a block told by its own row instead of the last before it."""
    shifted = iteration.shifted
    monkeypatch.setattr(
        iteration, "shifted", lambda plan, start, *given: shifted(plan, torch.zeros_like(start), *given)
    )
    found = context.exact_context(subject_of(random_sdar(0, shift=True)))
    assert [check.result for check in found] == [FAIL, FAIL]


def test_a_prefix_that_is_not_what_was_committed_fails_context(target, draft, monkeypatch):
    forward = ModelRunner.forward

    def forgetful(self, *arguments, **named):
        out = forward(self, *arguments, **named)
        if self._table is not None:  # the audited decoder; what it is compared with has no pages
            self.cache.values[:, :, :, 1] = 0.0
        return out

    monkeypatch.setattr(ModelRunner, "forward", forgetful)
    subject = subject_of(target, draft, PROMPTS[:2], batch=2)
    assert [check.result for check in context.exact_context(subject)] == [FAIL, FAIL]


@pytest.mark.parametrize("shift", [False, True], ids=["", "shifted"])
def test_exact_context_looks_at_states_of_later_blocks_and_at_partly_revealed_ones(shift):
    subject = subject_of(random_sdar(0, shift=shift), disturbed(random_sdar(0, shift=shift)))
    seen = context.exact_context(subject)[0].figures
    assert seen["states"] >= 20 and 0 < seen["ahead"] < seen["states"]
    assert seen["identical"] == seen["states"] and seen["alone"] == 0


@pytest.mark.parametrize("shift", [False, True], ids=["", "shifted"])
def test_temporal_leak_is_none_where_nothing_is_drafted_behind_the_judged_position(shift):
    target = random_sdar(0, shift=shift)
    drafted = leak.drafted_blocks(subject_of(target))
    for block in drafted:
        assert len(block.tokens) == 4 and MASK not in block.tokens
        assert sorted(step for step in block.steps if step) == list(range(1, 5 - block.known))
    for prefix in ([], [1, 2, 3, 4]):
        at_once = [leak.Drafted(prefix, [5, 6, 7, 8], [1, 1, 1, 1])]
        assert leak.temporal_leak(subject_of(target), at_once).figures["max"] == 0
        assert leak.temporal_context(subject_of(target), at_once).figures["max"] < 1e-4
    one_later = [leak.Drafted([1, 2, 3, 4], [5, 6, 7, 8], [1, 1, 1, 2])]
    assert leak.temporal_leak(subject_of(target), one_later).figures["max"] > 1e-3


# (d) distributions


@pytest.mark.parametrize("strategy", distribution.STRATEGIES)
def test_seeds_that_repeat_fail_the_law_of_texts(soft_target, soft_draft, strategy, monkeypatch):
    opening = Slots.open

    def repeating(self, slot, tokens, settings, kv_lens):
        opening(self, slot, tokens, settings | {"seed": settings["seed"] % 20}, kv_lens)

    monkeypatch.setattr(Slots, "open", repeating)
    assert distribution.text_law(subject_of(soft_target, soft_draft), strategy, 1e-3).result == FAIL


def test_noise_of_the_wrong_size_fails_the_law_of_texts(soft_target, soft_draft, monkeypatch):
    opening = Slots.open

    def colder(self, slot, tokens, settings, kv_lens):
        opening(self, slot, tokens, settings | {"temperature": 0.1}, kv_lens)

    monkeypatch.setattr(Slots, "open", colder)
    assert distribution.text_law(subject_of(soft_target, soft_draft), "sequential", 1e-3).result == FAIL


def test_mrs_that_accepts_everything_fails(soft_target, monkeypatch):
    subject = subject_of(soft_target, random_sdar(1, sharpness=0.5))
    assert distribution.mrs_op_law(subject, 1e-3).result == PASS
    verify = simsd_kernels.block_verify
    monkeypatch.setattr(
        simsd_kernels, "block_verify", lambda *a, coin, **k: verify(*a, coin=torch.zeros_like(coin), **k)
    )
    assert distribution.mrs_op_law(subject, 1e-3).result == FAIL


def test_nothing_drafted_and_too_few_draws_are_inconclusive(soft_target):
    one_token = random_sdar(0, block_length=1, sharpness=0.5)  # nothing is left to draft after a step
    subject = subject_of(one_token)
    short = subject_of(one_token, max_new_tokens=2)  # nothing to look up either
    assert equality.equality(short, "exact", "sequential", 0.0).result == INCONCLUSIVE
    assert leak.exact_leak(subject).result == INCONCLUSIVE
    assert {check.result for check in context.exact_context(subject)} == {INCONCLUSIVE}
    undrafted = distribution.text_law(subject, "sequential", 1e-3)
    assert undrafted.result == INCONCLUSIVE and "no token came from a draft" in undrafted.summary
    few = distribution.text_law(subject_of(soft_target, seeds=3), "sequential", 1e-3)
    assert few.result == INCONCLUSIVE and "too few" in few.summary


def test_plain_texts_follow_the_softmax_of_a_plain_forward(soft_target):
    scene = distribution.Scene([5, 9, 2], free=1, top_k=4)
    texts = distribution.plain_texts(soft_target, scene, "sequential", 20000, seed=0)
    logits = plain_logits(soft_target, [], [[5, 9, 2, MASK]])[0, 3].clone()
    logits[MASK] = -torch.inf
    kept = logits.topk(4)
    law = torch.zeros(64).index_put_((kept.indices,), kept.values.softmax(0))
    counts = torch.zeros(64)
    for (token,), count in texts.items():
        counts[token] = count
    assert chi_squared.against_law(counts, law).p > 1e-3


def test_plain_texts_fill_sub_blocks_from_the_left():
    whole, parts = random_sdar(0, sharpness=0.5), random_sdar(0, sharpness=0.5)
    parts.config.sub_block_length = 1
    scene = distribution.Scene([5, 9, 2, 40], free=4, top_k=3)
    native, _ = distribution.drawn_texts(subject_of(parts), scene, "low_confidence_static", 1000, verify="none")
    same, other = (distribution.plain_texts(of, scene, "low_confidence_static", 8000, seed=0) for of in (parts, whole))
    assert chi_squared.two_samples(*distribution._aligned(native, same)).p > 1e-3
    assert chi_squared.two_samples(*distribution._aligned(native, other)).p < 1e-6


@pytest.mark.parametrize("length", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("free", [2, 3])
def test_contexts_leave_the_free_positions_whatever_the_prompts(length, free):
    model = random_sdar(0, block_length=length)
    prompts = [[], [3], [4, 5, 6], list(range(1, 40))]
    free = free if free <= length else -(-free // length) * length
    for tokens in distribution._contexts(subject_of(model, prompts=prompts), free):
        assert (len(tokens) + free) % length == 0 and MASK not in tokens


@pytest.mark.parametrize("statistic, freedom, p", [(3.8415, 1, 0.05), (18.307, 10, 0.05), (29.588, 10, 0.001)])
def test_tail_of_chi_squared_matches_published_tables(statistic, freedom, p):
    assert chi_squared.tail(statistic, freedom) == pytest.approx(p, rel=1e-3)


def test_p_values_are_uniform_under_the_law_and_small_off_it():
    torch.manual_seed(0)
    law = torch.tensor([0.5, 0.25, 0.2, 0.04, 0.009, 0.001])

    def counts(of, draws):
        return torch.bincount(torch.multinomial(of, draws, replacement=True), minlength=6)

    one = torch.tensor([chi_squared.against_law(counts(law, 500), law).p for _ in range(500)])
    two = torch.tensor([chi_squared.two_samples(counts(law, 500), counts(law, 4000)).p for _ in range(500)])
    for p in (one, two):
        assert abs(p.mean() - 0.5) < 0.06 and abs((p < 0.1).float().mean() - 0.1) < 0.05
    off = torch.tensor([0.4, 0.35, 0.2, 0.04, 0.009, 0.001])
    assert chi_squared.against_law(counts(off, 2000), law).p < 1e-6
    assert chi_squared.two_samples(counts(off, 2000), counts(law, 8000)).p < 1e-6
    assert chi_squared.against_law(torch.tensor([10, 0, 1]), torch.tensor([0.5, 0.5, 0.0])).p == 0
    assert chi_squared.against_law(torch.tensor([5, 4]), torch.tensor([0.5, 0.5])) is None


def test_all_tests_of_chance_together_raise_a_false_alarm_below_one_in_a_thousand(soft_target):
    settings = Settings(**SMALL | {"seeds": 100})
    report = audit.run(soft_target, None, PROMPTS[:2], settings)
    tested = [check for check in report.checks if "p" in check.figures]
    assert 0 < len(tested) * report.alpha <= 1e-3
    assert f"{report.alpha:.1e}" in report.markdown() and "0.001" in report.markdown()
