"""Requests share the keys and values of equal beginnings; nothing but the time that takes shows."""

from __future__ import annotations

import random

import pytest
import torch

import pretended_cuda
import simsd
from simsd.decode.iteration import Parts
from simsd.models.runner import ModelRunner
from stand_ins import random_sdar

PAGE = 16
SETTINGS = {"max_new_tokens": 20, "end_token_ids": ()}
KINDS = pytest.mark.parametrize(
    "kind", [{"verify": "none"}, {"drafter": "self"}, {"drafter": "model"}, {}, {"verify": "temporal"}], ids=str
)


@pytest.fixture(scope="module")
def pair():
    return random_sdar(0), random_sdar(1)


def engine(pair, **settings) -> simsd.Engine:
    given = {"max_batch": 4, "max_length": 512, "page_size": PAGE, "max_rows": 16}
    return simsd.Engine(*pair, **given | settings)


def served(engine: simsd.Engine, jobs) -> list[simsd.Result]:
    numbers = [engine.add(prompt, **SETTINGS | given) for prompt, given in jobs]
    results = {update.index: update.result for update in engine.stream() if update.result is not None}
    metrics = engine.metrics()
    assert metrics.free_pages == metrics.pages
    return [results[number] for number in numbers]


def same(mine: list[simsd.Result], others: list[simsd.Result]) -> bool:
    """Bit for bit."""
    fields = ("tokens", "probs", "logprobs", "step_map", "finish_reason")
    return all(getattr(a, f) == getattr(b, f) for a, b in zip(mine, others, strict=True) for f in fields)


def prompt(count: int, seed: int = 0) -> list[int]:
    return [random.Random(seed).randrange(60) for _ in range(count)]


def family(length: int) -> list[list[int]]:
    """Prompts of a few hundred tokens that part at places of all kinds: the last token of a block or a page, or the
    first of the next."""
    base = prompt(4 * length + 40, seed=length)
    prompts = [base, base, base[: 2 * length], [*base, 5]]
    for place in (length - 1, length, 2 * length - 1, PAGE - 1, PAGE, 3 * PAGE - 1, 4 * length - 1):
        prompts.append([*base[:place], (base[place] + 1) % 60, *base[place + 1 :]])
    return prompts


@KINDS
@pytest.mark.parametrize("length", [32, 64, 6])
def test_texts_and_probabilities_are_those_without_sharing(length, kind):
    pair = random_sdar(0, block_length=length), random_sdar(1, block_length=length)
    draw = random.Random(length)
    jobs = [(one, kind | {"temperature": draw.choice((0, 0.8)), "seed": n}) for n, one in enumerate(family(length))]
    with_cache, without = engine(pair), engine(pair, prefix_cache=False)
    alone = served(without, jobs)
    assert all(result.stats.cached_tokens == 0 for result in alone)
    for _ in range(2):  # in the second round everything is there
        results = served(with_cache, jobs)
        assert same(results, alone)
    unit = with_cache.loop.prefixes.unit
    assert unit == {32: 32, 64: 64, 6: 48}[length]
    for (tokens, _), result in zip(jobs, results, strict=True):
        assert result.stats.cached_tokens == len(tokens) // length * length // unit * unit


@pytest.mark.parametrize("seed", range(6))
def test_requests_of_all_kinds_share_what_each_model_has_computed(pair, seed):
    """Those that no draft model was asked for leave nothing of it to those that need it."""
    draw, kinds = random.Random(seed), [mark for mark in KINDS.args[1]]
    base = prompt(100, seed)
    jobs = [(base[: draw.choice((40, 70, 100))], draw.choice(kinds)) for _ in range(12)]
    one, alone = engine(pair, max_batch=2), engine(pair, prefix_cache=False)
    results = served(one, jobs)
    assert same(results, served(alone, jobs)) and sum(result.stats.cached_tokens for result in results) > 200
    again = [(tokens + result.tokens, draw.choice(kinds)) for (tokens, _), result in zip(jobs, results, strict=True)]
    assert same(served(one, again), served(alone, again))


@pytest.mark.parametrize("length", [32, 64, 6])
def test_a_block_that_differs_in_its_last_token_is_not_shared(length):
    """Its first tokens see the last one."""
    target = random_sdar(0, block_length=length)
    one, unit = prompt(300), {32: 32, 64: 64, 6: 48}[length]
    for count in (1, 2):
        other = list(one)
        other[count * unit - 1] = (other[count * unit - 1] + 1) % 60
        alone = served(engine((target, None), prefix_cache=False), [(other, {})])
        shared = served(engine((target, None)), [(one, {}), (other, {})])
        assert shared[1].stats.cached_tokens == (count - 1) * unit and same(shared[1:], alone)


@KINDS
@pytest.mark.parametrize("pages", [24, 40])
def test_memory_that_runs_out_changes_nothing(pair, pages, kind):
    base = prompt(130)
    jobs = [([*base[: 40 + 30 * (n % 4)], *prompt(10, n)], kind | {"max_new_tokens": 60}) for n in range(10)]
    alone = served(engine(pair, prefix_cache=False), jobs)
    crowded = engine(pair, kv_memory=pages * page_bytes(pair))
    assert crowded.metrics().pages == pages
    assert same(served(crowded, jobs), alone)
    assert crowded.metrics().preemptions > 0 or pages > 24


def page_bytes(pair) -> int:
    caches = [ModelRunner(model, 1, PAGE).cache for model in pair]
    return sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)


def test_samples_of_one_prompt_compute_it_once(pair, monkeypatch):
    rows = []
    forward = ModelRunner.forward

    def counted(self, *arguments, **settings):
        out = forward(self, *arguments, **settings)
        rows.append(self.rows)
        return out

    monkeypatch.setattr(ModelRunner, "forward", counted)
    one = engine(pair, max_batch=8)
    jobs = [(prompt(200), {"verify": "none", "temperature": 1.0, "seed": n}) for n in range(8)]
    results = served(one, jobs)
    assert [result.stats.cached_tokens for result in results] == [0] + [192] * 7
    assert len({tuple(result.tokens) for result in results}) > 4
    assert sum(count >= 100 for count in rows) == 1


def test_what_was_generated_is_shared_with_who_goes_on_from_it(pair):
    """The turns of a chat."""
    one = engine(pair)
    tokens = prompt(30)
    for _ in range(3):
        result = served(one, [(tokens, {"max_new_tokens": 50})])[0]
        assert same([result], served(engine(pair, prefix_cache=False), [(tokens, {"max_new_tokens": 50})]))
        tokens = [*tokens, *result.tokens, *prompt(7)]
    assert result.stats.cached_tokens >= 30 + 50 + 7 + 30


def test_others_need_not_wait_for_a_prompt_that_two_have_in_common(pair):
    one = engine(pair, prefill_rows=64)
    common = prompt(300)
    jobs = [one.add(tokens, **SETTINGS) for tokens in (common, common, prompt(20, 1))]
    begun = []
    while one.busy:
        begun += [update.index for update in one.step() if update.index not in begun]
    assert begun == [jobs[0], jobs[2], jobs[1]] or begun == [jobs[2], jobs[0], jobs[1]]


def test_who_waits_for_a_prompt_computes_it_where_the_first_one_leaves(pair):
    one = engine(pair, prefill_rows=64)
    common = prompt(300)
    first, second = (one.add(common, **SETTINGS) for _ in range(2))
    one.step()
    one.cancel(first)
    results = {update.index: update.result for update in one.stream() if update.result is not None}
    assert results[first].tokens == [] and results[second].stats.cached_tokens == 0
    assert same([results[second]], served(engine(pair, prefix_cache=False), [(common, {})]))


def change_in_place(model) -> None:
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(3.0)


def load_other_weights(model) -> None:
    model.load_state_dict(random_sdar(7).model.state_dict())


@pytest.mark.parametrize("change", [change_in_place, load_other_weights])
@pytest.mark.parametrize("which", ["target", "draft"])
def test_nothing_is_shared_with_what_other_weights_have_computed(change, which):
    pair = random_sdar(0), random_sdar(1)
    one, job = engine(pair), [(prompt(100), {"drafter": "model"})]
    served(one, job)
    change(pair[which == "draft"].model)
    changed = served(one, job)
    assert changed[0].stats.cached_tokens == 0
    assert same(changed, served(engine(pair), job))
    assert served(one, job)[0].stats.cached_tokens == 96


def test_a_request_on_its_way_while_weights_change_leaves_nothing_to_share():
    pair = random_sdar(0), random_sdar(1)
    one = engine(pair)
    number = one.add(prompt(100), max_new_tokens=80, end_token_ids=())
    one.step()
    change_in_place(pair[0].model)
    job = [(prompt(60, 1), {})]
    assert same(served(one, job), served(engine(pair), job)) and number == 0
    again = [(prompt(100), {})]
    result = served(one, again)
    assert result[0].stats.cached_tokens == 0 and same(result, served(engine(pair), again))


def test_keys_and_values_of_a_text_that_failed_are_not_used_again(pair):
    spoilt = []

    def forward(runner, plan, slots, shape):
        logits = run_plan(runner, plan, slots, shape)
        return logits * float("nan") if spoilt else logits

    from simsd.decode.iteration import run_plan

    one = simsd.Engine(*pair, max_batch=2, max_length=512, page_size=PAGE, parts=Parts(forward=forward))
    number = one.add(prompt(100), **SETTINGS)
    one.step()
    spoilt.append(True)
    results = {update.index: update.result for update in one.stream() if update.result is not None}
    assert results[number].finish_reason == "failed"
    spoilt.clear()
    assert served(one, [(prompt(100), {})])[0].stats.cached_tokens == 0


@KINDS
def test_late_reports_share_the_same(pair, monkeypatch, one_thread, kind):
    """Iterations that are captured, and reported while the next one runs."""
    jobs = [(one, kind) for one in family(4)]
    alone = served(engine(pair, prefix_cache=False), jobs)
    pretended_cuda.pretend(monkeypatch)
    captured = engine(pair, parts=Parts(packed=False), kv_memory=30 * page_bytes(pair))
    for _ in range(2):
        assert same(served(captured, jobs), alone)
    assert captured.metrics().cached_pages > 0


@pytest.mark.parametrize("given", [1, 0, None, "yes"])
def test_prefix_cache_is_a_truth_value(pair, given):
    with pytest.raises(simsd.SimsdError, match="prefix_cache must be True or False"):
        engine(pair, prefix_cache=given)


@pytest.mark.parametrize("draft_device", [None, "cpu"])
def test_what_the_draft_has_computed_is_not_overstated(target, draft, draft_device):
    """Others would take pages over that it has not written; requests in the same slots, one after the other."""
    served = simsd.Engine(target, draft, max_batch=2, max_length=128, page_size=16, draft_device=draft_device)
    kinds = [{"drafter": "model"}, {"verify": "temporal"}, {"verify": "temporal", "draft_steps": 1}, {}] * 2
    for n, kind in enumerate(kinds):
        served.add([n + 1] * 10, max_new_tokens=30, end_token_ids=(), **kind)
    while served.busy:
        served.step()
        for slot, occupant in served.loop.scheduler.occupied:
            if occupant.request.finish_reason is None:
                assert occupant.written[1] <= served.loop.batch.slots.draft_kv_len[slot]
