"""The recipe of the built-in pair: its batches say who sees whom, and its step has the gradients of dense attention."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.environment import ROOT
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

        yield batches, forward
    for name in ("batches", "forward", "build_tokenizer"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def batch(recipe):
    batches, _ = recipe
    encoder = batches.Encoder(Tokenizer.from_file(str(PAIR / "tiny-target" / "tokenizer.json")))
    mixture = dict.fromkeys(("arithmetic", "code", "facts", "choice"), 0.25)
    return batches.training_batches(encoder, mixture, 6, 1, random.Random(1), np.random.default_rng(1))[0]


@pytest.fixture(scope="module")
def model():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16, "vocab_size": 1713}
    torch.manual_seed(0)
    config = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa")
    return Qwen3ForCausalLM(config)


def test_rows_see_their_own_block_of_their_own_copy_and_clean_blocks_before_it(recipe, batch):
    batches, _ = recipe
    seen, positions = batch.visibility.dense(), batch.positions
    rows, copies = positions.shape[1], batches.NOISY_COPIES
    clean = int((positions[0].diff() != 1).nonzero()[0]) + 1  # rows before the first copy
    copy = torch.cat((torch.zeros(clean), torch.arange(1, copies + 1).repeat_interleave((rows - clean) // copies)))
    block = positions // batches.BLOCK_LENGTH
    own = (block[:, :, None] == block[:, None]) & (copy[:, None] == copy[None])
    before = (block[:, :, None] > block[:, None]) & (copy == 0)[None, None]
    alive = batch.visibility.clock >= 0
    assert alive.any(1).all() and not alive.all()
    assert torch.equal(seen, (own | before) & alive[:, :, None] & alive[:, None])
    assert alive.flatten()[batch.masked].all()


def test_the_recipes_forward_is_the_stock_modules(recipe, batch, model):
    recipe[1].check(model, batch)


def test_a_step_has_the_gradients_of_dense_attention(recipe, batch, model):
    _, forward = recipe
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
