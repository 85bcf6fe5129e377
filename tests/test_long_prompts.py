"""Long prompts: they are computed in chunks beside what the others decode."""

from __future__ import annotations

import pytest

import simsd
from simsd.decode.iteration import Parts
from simsd.models.runner import ModelRunner
from stand_ins import random_sdar

ROWS = 64
LONG = [1 + n % 50 for n in range(403)]
SETTINGS = {"max_new_tokens": 24, "end_token_ids": ()}
PACKED = pytest.mark.parametrize("packed", [True, False], ids=["packed", "static"])
KINDS = pytest.mark.parametrize(
    "kind", [{"verify": "none"}, {"drafter": "self"}, {"drafter": "model"}, {}, {"verify": "temporal"}], ids=str
)


@pytest.fixture(scope="module")
def pair():
    return random_sdar(0), random_sdar(1)


def engine(pair, packed: bool, **settings) -> simsd.Engine:
    given = {"max_batch": 4, "max_length": 512, "prefill_rows": ROWS, "max_rows": 16}
    return simsd.Engine(*pair, parts=Parts(packed=packed), **given | settings)


@pytest.fixture
def rows(monkeypatch):
    """The rows [A, R] of every forward, dead ones among them, by model."""
    seen = []
    forward = ModelRunner.forward

    def counted(self, tokens, *arguments, **settings):
        seen.append((self.model.model, tuple(tokens.shape)))
        return forward(self, tokens, *arguments, **settings)

    monkeypatch.setattr(ModelRunner, "forward", counted)
    return seen


@PACKED
@KINDS
def test_others_go_on_while_a_long_prompt_is_computed(pair, rows, packed, kind):
    one = engine(pair, packed)
    short = one.add([5, 6, 7], max_new_tokens=200, end_token_ids=(), verify="none")
    one.step()
    long = one.add(LONG, **SETTINGS, **kind)
    steps = 0
    while True:
        rows.clear()
        updates = {update.index for update in one.step()}
        assert short in updates
        if long in updates:
            break
        steps += 1
        chunks = [[shape for who, shape in rows if who is model.model and shape[1] > ROWS // 2] for model in pair]
        assert chunks[0] == [(1, ROWS)] and chunks[1] in ([], [(1, ROWS)])
    assert steps == len(LONG) // ROWS  # the rest comes along with the first iteration that it takes part in


@PACKED
@KINDS
def test_a_text_is_the_same_whatever_the_chunks(pair, packed, kind):
    prompts = [LONG, LONG[:90], LONG[7:207], [3, 4], LONG[1:65]]
    whole = engine(pair, packed, prefill_rows=4096).generate(prompts, **SETTINGS, **kind)
    chunked = engine(pair, packed).generate(prompts, **SETTINGS, **kind)
    for mine, other in zip(chunked, whole, strict=True):
        assert (mine.tokens, mine.probs, mine.step_map) == (other.tokens, other.probs, other.step_map)


def test_prompts_are_computed_in_the_order_in_which_they_came(pair):
    one = engine(pair, True)
    numbers = [one.add(LONG[n:], **SETTINGS) for n in range(3)]
    begun = []
    while one.busy:
        begun += [update.index for update in one.step() if update.index not in begun]
    assert begun == numbers


def test_a_prompt_costs_a_model_that_is_not_asked_nothing(pair, rows):
    engine(pair, True).generate([LONG], verify="none", **SETTINGS)
    engine(pair, True).generate([LONG], drafter="self", **SETTINGS)
    assert all(who is pair[0].model for who, _ in rows)


def test_a_request_may_end_before_its_prompt_is_computed(pair):
    one = engine(pair, True)
    number = one.add(LONG, **SETTINGS)
    one.step()
    one.cancel(number)
    (update,) = one.step()
    assert update.result.finish_reason == "cancelled" and update.result.tokens == [] and not one.busy
    assert one.generate([LONG], **SETTINGS)[0].tokens == engine(pair, True).generate([LONG], **SETTINGS)[0].tokens
