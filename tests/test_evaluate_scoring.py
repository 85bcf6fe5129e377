"""Scores of texts: against forwards of a plain model, and against what decoding itself says of its tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import simsd
from simsd.evaluate import scoring
from simsd.evaluate.scoring import Scorer
from stand_ins import END, MASK, VOCABULARY, random_sdar

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXTS = {"none": 0, "within a block": 3, "whole blocks": 8, "long": 21}


def draw(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, END, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def plain(model: simsd.LoadedModel, context: list[int], continuation: list[int], block_length: int) -> tuple:
    """A forward of the whole text per token, what is not known yet of its block masked."""
    total, greedy = 0.0, True
    for i, token in enumerate(continuation):
        known = [*context, *continuation[:i]]
        tokens = known + [MASK] * (block_length - len(known) % block_length)
        row = max(len(known) - 1, 0) if model.shift else len(known)
        logits = model.model(torch.tensor([tokens])).logits[0, row].double()
        logits[model.banned_ids] = -math.inf
        total += logits.log_softmax(-1)[token].item()
        greedy = greedy and int(logits.argmax()) == token
    return total, greedy


@pytest.mark.parametrize("length", [1, 4, 9])
@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("block_length", [1, 4, 6])
@pytest.mark.parametrize("shift", [False, True], ids=["", "shifted"])
def test_a_score_is_that_of_one_plain_forward_per_token(shift, block_length, context, length):
    model = random_sdar(0, block_length=block_length, shift=shift)
    context, continuation = draw(context), draw(length, 1)
    score, greedy = Scorer(model).score(context, continuation)
    expected, expected_greedy = plain(model, context, continuation, block_length)
    assert score == pytest.approx(expected, abs=1e-4) and greedy is expected_greedy


@pytest.mark.parametrize("shift", [False, True], ids=["", "shifted"])
def test_a_score_in_several_forwards_is_the_same(shift, monkeypatch):
    target = random_sdar(0, shift=shift)
    context, continuation = draw(70), draw(30, 1)
    whole = Scorer(target).score(context, continuation)
    monkeypatch.setattr(scoring, "MAX_ROWS", 12)
    assert Scorer(target).score(context, continuation) == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("shift", [False, True], ids=["", "shifted"])
def test_decoding_says_the_same_of_its_own_tokens(shift, seed):
    target = random_sdar(0, shift=shift)
    context = draw(10, seed)
    settings = {"strategy": "sequential", "max_new_tokens": 15, "end_token_ids": ()}
    (drawn,) = simsd.generate(target, [context], temperature=1.0, seed=seed, verify="none", **settings)
    assert Scorer(target).score(context, drawn.tokens)[0] == pytest.approx(sum(drawn.logprobs), abs=1e-3)
    (greedy,) = simsd.generate(target, [context], verify="none", **settings)
    score, is_greedy = Scorer(target).score(context, greedy.tokens)
    assert is_greedy and score == pytest.approx(sum(greedy.logprobs), abs=1e-3)
    assert not Scorer(target).score(context, [(greedy.tokens[0] + 1) % END])[1]


def test_texts_share_one_unit_of_probability(target):
    """All two-token texts across the end of a block."""
    scorer, context = Scorer(target), draw(7)
    texts = itertools.product(range(VOCABULARY), repeat=2)
    known = [token for token in range(VOCABULARY) if token not in target.banned_ids]
    total = sum(math.exp(scorer.score(context, text)[0]) for text in texts if set(text) <= set(known))
    assert total == pytest.approx(1.0, abs=1e-4)


def test_what_was_scored_before_does_not_matter(target):
    scorer, fresh = Scorer(target), {}
    texts = [
        (draw(9), draw(3, 1)),
        (draw(300), draw(5, 2)),
        (draw(9), draw(4, 3)),
        (draw(12, 4), draw(9, 5)),
        ([], [5]),
    ]
    for context, continuation in [*texts, *texts[::-1]]:
        key = len(context), *continuation
        score = scorer.score(context, continuation)[0]
        fresh.setdefault(key, Scorer(target).score(context, continuation)[0])
        assert score == pytest.approx(fresh[key], abs=1e-4)


def test_nothing_to_score_is_certain(target):
    assert Scorer(target).score(draw(5), []) == (0.0, True)


def test_what_is_never_generated_has_no_probability(target):
    assert Scorer(target).score(draw(5), [MASK]) == (-math.inf, False)


def test_a_text_beyond_the_positions_is_refused(target):
    with pytest.raises(simsd.SimsdError, match="513 tokens to score.*516, exceed the 512 positions"):
        Scorer(target).score(draw(512), [1])
