"""Decoding with an order head: it decides how many target forwards a text takes, never the text."""

from __future__ import annotations

import shutil

import pytest
import torch

import simsd
from simsd import questionnaires
from simsd.decode.iteration import Parts
from simsd.engine.tuner import Tuner
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


def decode(target, prompts, order_head="none", parts=None, **settings):
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
    assert taken != taken_without


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "static"])
def test_a_head_that_is_not_asked_is_as_none(target, prompts, file, packed, monkeypatch):
    parts = Parts(packed=packed)
    asked = decode(target, prompts, file(0.5), parts)
    monkeypatch.setattr(Tuner, "heads", lambda self, has_head: [False] * len(self.modes))
    not_asked = decode(target, prompts, file(0.5), parts)
    assert not_asked == decode(target, prompts, parts=parts) != asked


def test_a_head_for_other_blocks_is_refused(target, prompts, file):
    with pytest.raises(
        simsd.SimsdError, match=r"is for blocks of 16 tokens, long-target is decoded in blocks of 8: train"
    ):
        decode(target, prompts, file(0.0), block_length=8)


def test_a_head_beside_the_weights_is_taken_by_itself(target, prompts, file, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(target.folder, folder)
    for found in folder.glob("order-*"):
        found.unlink()
    shutil.copy(file(0.5), folder / "order-16.safetensors")
    beside = simsd.load(folder)
    given = decode(target, prompts, folder / "order-16.safetensors")
    assert decode(beside, prompts, "auto") == given
    without = decode(target, prompts, "none")
    assert decode(beside, prompts, "none") == without
    assert given[0] == without[0] and given[1] != without[1]
    # For other blocks there is none.
    assert decode(beside, prompts, "auto", block_length=8) == decode(target, prompts, "none", block_length=8)


def test_a_module_in_memory_has_none_beside_it(target, prompts):
    assert decode(simsd.load(target.model), prompts, "auto") == decode(target, prompts, "none")
