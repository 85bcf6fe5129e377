"""The recipe of the built-in pair: its batches say who sees whom, and its step has the gradients of dense attention."""

from __future__ import annotations

import dataclasses
import io
import random
import re
import sys

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

import simsd
from benchmarks.environment import ROOT
from simsd import questionnaires, tasks
from simsd.models.folders import PAIR

RECIPE = ROOT / "examples" / "tiny_pair"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def recipe():
    """The recipe's modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RECIPE))
        import batches
        import forward
        import recipes

        yield batches, forward, recipes.RECIPES
    for name in ("accuracy", "batches", "forward", "build_tokenizer", "recipes"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module", params=[("tiny", 4), ("long", 8), ("long", 16), ("long", 32)], ids=str)
def block_length(request):
    """Of a pair's batches."""
    return request.param


@pytest.fixture(scope="module")
def batch(recipe, block_length):
    batches, _, recipes = recipe
    pair, length = block_length
    encoder = batches.Encoder(Tokenizer.from_file(str(PAIR / "tiny-target" / "tokenizer.json")))
    chosen = dataclasses.replace(recipes[pair], items_per_step=6, block_lengths=(length,))
    return batches.training_batches(encoder, chosen, 1, random.Random(1), np.random.default_rng(1))[0]


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 1713}
    torch.manual_seed(0)
    config = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa")
    return Qwen3ForCausalLM(config)


def test_rows_see_their_own_block_of_their_own_copy_and_clean_blocks_before_it(recipe, batch, block_length):
    batches, *_ = recipe
    seen, positions = batch.visibility.dense(), batch.positions
    rows, copies = positions.shape[1], batches.NOISY_COPIES
    clean = int((positions[0].diff() != 1).nonzero()[0]) + 1  # rows before the first copy
    copy = torch.cat((torch.zeros(clean), torch.arange(1, copies + 1).repeat_interleave((rows - clean) // copies)))
    block = positions // block_length[1]
    own = (block[:, :, None] == block[:, None]) & (copy[:, None] == copy[None])
    before = (block[:, :, None] > block[:, None]) & (copy == 0)[None, None]
    alive = batch.visibility.clock >= 0
    assert alive.any(1).all() and not alive.all()
    assert torch.equal(seen, (own | before) & alive[:, :, None] & alive[:, None])
    assert alive.flatten()[batch.masked].all()


def test_the_recipes_forward_is_the_stock_modules(recipe, batch, model):
    recipe[1].check(model, batch)


def test_a_step_has_the_gradients_of_dense_attention(recipe, batch, model):
    _, forward, _ = recipe
    mask = forward.dense_mask(batch)

    def dense(_):
        attention = torch.nn.functional.scaled_dot_product_attention
        return lambda q, k, v: attention(q, k, v, attn_mask=mask, enable_gqa=True)

    parameters = list(model.parameters())
    found, wanted = (
        torch.autograd.grad(forward.batch_loss(model, batch, torch.float32, attention), parameters)
        for attention in (forward.interval_attention, dense)
    )
    for gradient, expected in zip(found, wanted, strict=True):
        assert expected.any()
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().amax()))


# What the models answer


def test_the_report_has_both_grades_of_questionnaires_at_every_block_length(recipe):
    import accuracy

    out = io.StringIO()
    accuracy.report("long-target", recipe[2]["long"], 1, Console(file=out))
    lines = out.getvalue().splitlines()
    assert [line.partition(" (1 prompts")[0] for line in lines] == [
        f"blocks of {length}, {grade}" for length in (16, 8, 32) for grade in ("questions", "whole prompts")
    ]
    assert all(re.search(r"arithmetic \d\.\d{3}  code .* choice \d\.\d{3}  average \d\.\d{3}", line) for line in lines)


def test_a_grade_is_the_mean_of_the_answers_grades(recipe):
    import accuracy

    model, count = simsd.load("long-draft"), 3
    grades = accuracy.accuracies(model, recipe[2]["long"], 16, count)
    assert {name: set(found) for name, found in grades.items()} == {
        name: set(tasks.FAMILIES) for name in ("questions", "whole prompts")
    }
    items = questionnaires.held_out("facts", count)
    answers = simsd.generate(model, [item.prompt for item in items], verify="none", max_new_tokens=128)
    scores = [questionnaires.score(item, answer.text) for item, answer in zip(items, answers, strict=True)]
    assert grades["questions"]["facts"] == pytest.approx(sum(scores) / count)
    assert grades["whole prompts"]["facts"] == pytest.approx(scores.count(1.0) / count)
    (tiny,) = accuracy.accuracies(simsd.load("tiny-draft"), recipe[2]["tiny"], 4, 1)
    assert tiny == "answers"
