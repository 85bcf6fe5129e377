"""Models whose row predicts the next position: native decoding against plain forwards, exact against native."""

from __future__ import annotations

import pytest
import torch

import simsd
from benchmarks.cpu import trace_iteration as tracing
from simsd import EngineConfig, GenerationConfig
from simsd.decode.iteration import Parts
from simsd.models.loading import LoadedModel
from stand_ins import MASK, disturbed, random_sdar
from test_trace_iteration import SHAPES

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = [1 + i % 50 for i in range(40)]
PROMPTS = [LONG, LONG, [*LONG, 3], LONG[:32], [], [5], [5, 6, 7, 8]]
MODES = [
    {"verify": "none"},
    {"drafter": "self"},
    {"drafter": "model"},
    {"drafter": "model", "temperature": 1.0},
    {"drafter": "model", "draft_steps": 2},
]


@pytest.fixture(scope="module")
def pair() -> tuple[LoadedModel, LoadedModel]:
    return random_sdar(shift=True), disturbed(random_sdar(shift=True))


def greedy_by_whole_forwards(model: LoadedModel, prompt: list[int], blocks: int) -> list[int]:
    """One token per step, the most confident, each step a forward of the module over the whole text."""
    length, text = model.block_length, list(prompt)
    for _ in range(blocks):
        begin = len(text) // length * length
        text += [MASK] * (begin + length - len(text))
        masked = {i for i in range(begin, len(text)) if text[i] == MASK and i >= len(prompt)}
        while masked:
            with torch.no_grad():
                logits = model.model(torch.tensor([text])).logits[0].double()
            logits[:, model.banned_ids] = -torch.inf
            told = {i: logits[i - 1 if i else 0] for i in masked}
            best = max(sorted(masked), key=lambda i: told[i].softmax(-1).max().item())
            text[best] = int(told[best].argmax())
            masked.remove(best)
    return text[len(prompt) :]


# Without a prompt all rows of the first block are the same, but for rounding.
@pytest.mark.parametrize("prompt", [p for p in PROMPTS[1:] if p], ids=lambda prompt: f"{len(prompt)} tokens")
def test_native_decoding_takes_the_logits_of_the_row_before(pair, prompt):
    target, _ = pair
    expected = greedy_by_whole_forwards(target, prompt, blocks=4)
    config = GenerationConfig(max_new_tokens=len(expected), verify="none", end_token_ids=())
    [result] = simsd.generate(target, [prompt], config=config)
    assert result.tokens == expected
    unshifted = simsd.load(target.model, shift=False)
    assert simsd.generate(unshifted, [prompt], config=config)[0].tokens != expected


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("packed", [None, False], ids=["packed", "static shapes"])
def test_texts_beside_others_are_native_decodings_alone(pair, mode, packed):
    """Some prompts share pages, whose last row is computed again by all of them."""
    target, draft = pair
    settings = {"max_new_tokens": 24, "end_token_ids": (), "seed": 1, "temperature": 0.0} | mode
    native = GenerationConfig(**{name: settings[name] for name in ("max_new_tokens", "end_token_ids", "seed")})
    native = GenerationConfig(**vars(native) | {"verify": "none", "temperature": settings["temperature"]})
    alone = [simsd.generate(target, [prompt], config=native)[0] for prompt in PROMPTS]
    engine = simsd.Engine(
        target, draft, EngineConfig(max_batch=4, page_size=16, lookahead=3), parts=Parts(packed=packed)
    )
    for _ in range(2):
        found = engine.generate(PROMPTS, **settings)
        assert [result.tokens for result in found] == [result.tokens for result in alone]
        assert [result.probs for result in found] == [result.probs for result in alone]


@pytest.mark.parametrize("shifts", [(True, False), (False, True)], ids=["target", "draft"])
def test_a_draft_may_predict_otherwise_than_its_target(pair, shifts):
    target, draft = (simsd.load(model.model, shift=shift) for model, shift in zip(pair, shifts, strict=True))
    native, exact = (
        simsd.generate(target, PROMPTS, draft, max_new_tokens=16, end_token_ids=(), **settings)
        for settings in ({"verify": "none"}, {"drafter": "model"})
    )
    assert [result.tokens for result in exact] == [result.tokens for result in native]
    assert [model.shift for model in (target, draft)] == list(shifts)


def test_drafts_are_accepted(pair):
    target, draft = pair
    results = simsd.generate(target, [LONG], draft, max_new_tokens=32, end_token_ids=(), drafter="model")
    assert results[0].stats.target_forwards < 0.8 * 32


@pytest.mark.parametrize("name", SHAPES)
def test_no_iteration_reads_or_uploads(name, monkeypatch):
    """`trace` raises where the host reads."""
    plain = len(tracing.trace("1.7B", "1.7B", SHAPES[name], batch=3, layers=1).calls)
    monkeypatch.setattr(LoadedModel, "shift", True)
    launches = tracing.trace("1.7B", "1.7B", SHAPES[name], batch=3, layers=1)
    assert not launches.uploads and len(launches.calls) > plain


def test_loss_is_of_the_next_token_as_transformers_has_it(pair):
    model = pair[0].model
    tokens = torch.tensor([LONG[:8]])
    out = model(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(out.logits[0, :-1].float(), tokens[0, 1:])
    torch.testing.assert_close(out.loss, expected)
