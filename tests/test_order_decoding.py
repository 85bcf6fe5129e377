"""Decoding with an order head: it decides how many target forwards a text takes, never the text."""

from __future__ import annotations

import pytest
import torch

import simsd
from simsd import questionnaires
from simsd.decode.iteration import Parts
from simsd.order.head import OrderHead, save_order_head

LENGTH = 16


@pytest.fixture(scope="module")
def target():
    return simsd.load("long-target")


@pytest.fixture(scope="module")
def prompts(target):
    return [
        target.encode_prompt(item.prompt)
        for family in questionnaires.FAMILIES
        for item in questionnaires.held_out(family, 1)
    ]


@pytest.fixture(scope="module")
def file(tmp_path_factory, target):
    """Of a head that knows nothing, and changes something (`disturbed`) or nothing."""

    def save(disturbed: float):
        torch.manual_seed(0)
        head = OrderHead(LENGTH)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter += disturbed * torch.randn_like(parameter)
        path = tmp_path_factory.mktemp("head") / "order.safetensors"
        save_order_head(head, path, target, {})
        return path

    return save


def decode(target, prompts, order_head=None, parts=None, **settings):
    config = {
        "block_length": LENGTH,
        "max_new_tokens": 32,
        "max_rows": 128,
        "max_batch": 1,
        "drafter": "self",
    } | settings
    decoder = simsd.Decoder(target, prompts, None, order_head=order_head, parts=parts or Parts(), **config)
    for _ in decoder:
        pass
    results = decoder.results()
    return [result.tokens for result in results], sum(result.stats.target_forwards for result in results)


def test_an_untrained_head_is_the_rule_itself(target, prompts, file):
    assert decode(target, prompts, file(0.0)) == decode(target, prompts)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "static"])
@pytest.mark.parametrize(
    "settings", [{}, {"max_batch": 3}, {"drafter": "lookup"}, {"temperature": 0.8, "seed": 1}], ids=str
)
def test_a_head_changes_the_forwards_and_not_the_text(target, prompts, file, settings, packed):
    native, _ = decode(target, prompts, verify="none", **{k: v for k, v in settings.items() if k != "drafter"})
    given = {"target": target, "prompts": prompts, "parts": Parts(packed=packed), **settings}
    with_head, taken = decode(order_head=file(0.5), **given)
    without, taken_without = decode(**given)
    assert with_head == without == native
    # With noise each state has draws of its own, and what was seen in another says nothing of them.
    assert (taken != taken_without) == ("temperature" not in settings)


def test_a_head_for_other_blocks_is_refused(target, prompts, file):
    with pytest.raises(
        simsd.SimsdError, match=r"is for blocks of 16 tokens, long-target is decoded in blocks of 8: train"
    ):
        decode(target, prompts, file(0.0), block_length=8)
