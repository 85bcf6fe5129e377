"""New weights while requests run, and engines that sleep."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import pretended_cuda
import simsd
from simsd import SimsdError
from simsd.decode.iteration import Parts
from stand_ins import random_sdar

PROMPTS = [[(3 * n + i) % 60 for i in range(20 + 25 * n)] for n in range(6)]
SETTINGS = {"max_new_tokens": 40, "end_token_ids": ()}
KINDS = pytest.mark.parametrize(
    "kind", [{"verify": "none"}, {"drafter": "self"}, {"drafter": "model"}, {}, {"verify": "temporal"}], ids=str
)


@pytest.fixture
def pair():
    return random_sdar(0), random_sdar(1)


def other_weights(seed: int = 7) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in random_sdar(seed).model.state_dict().items()}


def engine(pair, **settings) -> simsd.Engine:
    return simsd.Engine(*pair, **{"max_batch": 4, "max_length": 256, "page_size": 16, "max_rows": 16} | settings)


def jobs(kind) -> list[dict]:
    return [kind | SETTINGS | {"temperature": 0.7 * (n % 2), "seed": n} for n in range(len(PROMPTS))]


def finished(engine: simsd.Engine) -> dict[int, simsd.Result]:
    results = {update.index: update.result for update in engine.stream() if update.result is not None}
    metrics = engine.metrics()
    assert metrics.free_pages == metrics.pages
    return results


@KINDS
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("which", ["target", "draft"])
def test_from_an_update_on_texts_are_those_of_an_engine_with_the_new_weights(
    pair, kind, captured, which, monkeypatch, one_thread
):
    if captured:
        pretended_cuda.pretend(monkeypatch)
    running = engine(pair, parts=Parts(packed=False) if captured else Parts())
    numbers = [running.add(prompt, **job) for prompt, job in zip(PROMPTS, jobs(kind), strict=True)]
    for _ in range(6):
        running.step()
    running.update_weights(other_weights(), draft=which == "draft")
    before = [running.result(number).tokens for number in numbers]
    assert any(before) and not all(before)
    results = finished(running)

    fresh_pair = [random_sdar(0), random_sdar(1)]
    fresh_pair[which == "draft"] = random_sdar(7)
    monkeypatch.undo()
    for number, prompt, job, tokens in zip(numbers, PROMPTS, jobs(kind), before, strict=True):
        fresh = engine(fresh_pair, max_batch=1, prefix_cache=False)
        rest = fresh.generate([prompt + tokens], job | {"max_new_tokens": 40 - len(tokens)})[0]
        assert results[number].tokens == tokens + rest.tokens
        assert results[number].probs[len(tokens) :] == rest.probs
    changed = simsd.generate(random_sdar(0), [PROMPTS[0]], random_sdar(1), **jobs(kind)[0])[0]
    assert which == "draft" or results[numbers[0]].tokens != changed.tokens


def test_an_update_forgets_what_drafts_were_worth(pair):
    one = engine(pair)
    one.generate(PROMPTS, **SETTINGS)
    assert any(kind.judged for kind in one.loop.tuner.history.acceptance.values()) and one.loop.tuner.history.records
    one.update_weights({})
    assert not any(kind.judged for kind in one.loop.tuner.history.acceptance.values())
    assert not one.loop.tuner.history.records and one.loop.tuner.target.n > 0


def test_an_update_of_nothing_tells_of_changes_that_nobody_could_see(pair):
    one = engine(pair)
    one.generate([PROMPTS[5]], **SETTINGS)
    pair[0].model.model.layers[0].mlp.down_proj.weight.data.mul_(2.0)
    one.update_weights({})
    (result,) = one.generate([PROMPTS[5]], **SETTINGS)
    assert result.stats.cached_tokens == 0
    assert result.tokens == engine(pair).generate([PROMPTS[5]], **SETTINGS)[0].tokens


@pytest.mark.parametrize("form", [dict, lambda weights: iter(weights.items()), lambda weights: list(weights.items())])
def test_weights_come_as_a_mapping_or_one_by_one_in_any_dtype(pair, form):
    one, weights = engine(pair), other_weights()
    one.update_weights(form({name: value.double() for name, value in weights.items()}))
    for name, value in pair[0].model.state_dict().items():
        assert torch.equal(value, weights[name]) and value.dtype == torch.float32


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"model.nothing.weight": torch.zeros(1)}, "SDARForCausalLM has no weight 'model.nothing.weight': names are"),
        ({"lm_head.weight": torch.zeros(3, 4)}, r"lm_head.weight of SDARForCausalLM is \[64, 32\], got \[3, 4\]"),
        ({"lm_head.weight": [1.0]}, "lm_head.weight must be a tensor, got list"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(pair, weights, message):
    one, before = engine(pair), other_weights(0)
    with pytest.raises(SimsdError, match=message):
        one.update_weights({"model.norm.weight": torch.zeros(32)} | weights)
    assert all(torch.equal(value, before[name]) for name, value in pair[0].model.state_dict().items())
    assert one.generate(PROMPTS[:1], **SETTINGS)[0].tokens == engine(pair).generate(PROMPTS[:1], **SETTINGS)[0].tokens


@pytest.mark.parametrize("weights", [None, 7, "model.safetensors", ["abc"], [("lm_head.weight",)]], ids=str)
def test_what_is_no_weights_is_refused(pair, weights):
    with pytest.raises(SimsdError, match="weights must be .*pairs of a name and a tensor, got"):
        engine(pair).update_weights(weights)


def test_an_update_that_breaks_off_leaves_an_engine_of_what_weights_there_are(pair):
    one = engine(pair)
    number = one.add(PROMPTS[3], **SETTINGS)
    one.step()

    def breaking():
        yield "model.norm.weight", torch.full((32,), 0.5)
        raise OSError("connection lost")

    with pytest.raises(OSError, match="connection lost"):
        one.update_weights(breaking())
    tokens = one.result(number).tokens
    rest = engine(pair).generate([PROMPTS[3] + tokens], max_new_tokens=40 - len(tokens), end_token_ids=())[0]
    assert finished(one)[number].tokens == tokens + rest.tokens


def test_without_a_draft_model_it_cannot_be_updated(pair):
    with pytest.raises(SimsdError, match="no draft model"):
        engine((pair[0], None)).update_weights({}, draft=True)


@KINDS
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
def test_a_sleep_changes_no_text_and_frees_memory(pair, kind, captured, monkeypatch, one_thread):
    alone = [engine(pair).generate([p], job)[0] for p, job in zip(PROMPTS, jobs(kind), strict=True)]
    if captured:
        pretended_cuda.pretend(monkeypatch)
    one = engine(pair, parts=Parts(packed=False) if captured else Parts())
    numbers = [one.add(prompt, **job) for prompt, job in zip(PROMPTS[:5], jobs(kind), strict=False)]
    results = {}
    for _ in range(5):
        results |= {update.index: update.result for update in one.step() if update.result is not None}
    kept = weakref.ref(one.loop.batch.runner.target.cache.keys), weakref.ref(one.loop.batch.slots.text)
    one.sleep()
    gc.collect()
    assert [ref() for ref in kept] == [None, None]
    metrics = one.metrics()
    assert (metrics.running, metrics.cached_pages, metrics.free_pages) == (0, 0, metrics.pages)
    numbers.append(one.add(PROMPTS[5], **jobs(kind)[5]))
    with pytest.raises(SimsdError, match="the engine sleeps: call wake"):
        for _ in range(2):  # the first may bring what was on its way
            results |= {update.index: update.result for update in one.step() if update.result is not None}
    one.sleep()  # for longer
    one.wake()
    results |= finished(one)
    for number, expected in zip(numbers, alone, strict=True):
        assert (results[number].tokens, results[number].probs) == (expected.tokens, expected.probs)


def test_who_is_cancelled_in_a_sleep_is_gone(pair):
    one = engine(pair)
    first, second = (one.add(prompt, **SETTINGS) for prompt in PROMPTS[:2])
    one.step()
    one.sleep()
    one.cancel(first)
    one.wake()
    results = finished(one)
    assert results[first].finish_reason == "cancelled" and len(results[second].tokens) == 40


def test_a_sleep_before_the_first_request_is_one_too(pair):
    one = engine(pair)
    one.sleep()
    with pytest.raises(SimsdError, match="sleeps"):
        one.generate(PROMPTS[:1], **SETTINGS)
    one.wake()
    assert len(one.generate(PROMPTS[:1], **SETTINGS)[0].tokens) == 40
