# ruff: noqa: F811 (fixtures are imported by name)
"""`model.generate` decodes by block diffusion: one prompt, padded batches, what is returned."""

from __future__ import annotations

import copy

import pytest
import torch

import simsd
from hf_runs import MANY, NEW, PAD, PROMPT, SAMPLING, draft, greedy, padded, run  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"strategy": "sequential", "steps": 2},
        {"sub_block_length": 2, "steps": 3},
        {"verify": "temporal", "sub_block_length": 2},
        {"drafter": "model", "lookahead": 3, "max_rows": 24, "draft_steps": 2},
        {"drafter": "self", "strategy": "low_confidence_dynamic", "threshold": 0.3},
        {"verify": "temporal"},
        {"verify": "temporal", "strategy": "entropy_bounded", "entropy_bound": 1.0, "rejected_tail": "target_argmax"},
        {"verify": "temporal", "strategy": "low_confidence_dynamic", "threshold": 0.3, "draft_steps": 2},
        {"verify": "temporal", "block_length": 8, "rejected_tail": "truncate_no_bonus", "end_gate": 0.5},
        {"verify": "temporal", "accept": "mrs"},
        {"verify": "none"},
    ],
    ids=lambda settings: "_".join(map(str, settings.values())) or "defaults",
)
def test_the_tokens_are_those_of_simsd_generate(target, draft, run, settings):
    [expected] = simsd.generate(target, [PROMPT], draft, simsd.GenerationConfig(max_new_tokens=NEW, **settings))
    assert run(**settings).tolist() == [PROMPT + expected.tokens]


@pytest.mark.parametrize("assistant", [True, False], ids=["assistant", "alone"])
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "seed": 4}], ids=["greedy", "sampling"])
def test_by_default_the_text_is_that_of_native_decoding(run, draft, assistant, sampling):
    settings = {"return_dict_in_generate": True} | sampling
    native = run(verify="none", **settings)
    ours = run(assistant_model=draft.model if assistant else None, **settings)
    assert ours.sequences.tolist() == native.sequences.tolist()
    assert ours.results[0].step_map == native.results[0].step_map
    assert ours.results[0].probs == native.results[0].probs
    assert ours.results[0].stats.target_forwards <= native.results[0].stats.target_forwards


def test_without_an_assistant_the_model_drafts_for_itself(run):
    # Not `auto`: whether a draft pays it tells from measured times.
    [result] = run(assistant_model=None, drafter="self", max_rows=MANY, return_dict_in_generate=True).results
    assert result.stats.draft_forwards == 0 and result.stats.accepted > 0 and "drafted" in result.origins


def test_temporal_verification_without_an_assistant_decodes_natively(run):
    native = run(verify="none")
    output = run(assistant_model=None, verify="temporal", return_dict_in_generate=True)
    assert output.sequences.tolist() == native.tolist()
    assert set(output.results[0].origins) == {"denoised"}


@pytest.mark.parametrize(
    ("settings", "origins"),
    [({"drafter": "model", "max_rows": MANY}, {"denoised", "drafted"}), ({"verify": "temporal"}, {"drafted", "bonus"})],
    ids=["exact", "temporal"],
)
def test_the_named_verifier_judges_the_assistants_drafts(run, settings, origins):
    [result] = run(return_dict_in_generate=True, **settings).results
    assert result.stats.draft_forwards > 0 and result.stats.accepted > 0
    assert set(result.origins) == origins


def test_lookahead_and_rows_change_the_work_and_not_the_text(target, run, greedy):
    def forwards(**settings):
        perfect = {"drafter": "model", "assistant_model": target.model, "draft_steps": 4}
        output = run(return_dict_in_generate=True, **perfect, **settings)
        assert output.sequences.tolist() == [PROMPT + greedy]
        return output.results[0].stats.target_forwards

    one_block = forwards(lookahead=1, max_rows=MANY)
    assert forwards(lookahead=3, max_rows=MANY) < one_block < forwards(max_rows=0)


def test_the_output_tells_how_it_came(run, greedy):
    output = run(drafter="model", max_rows=MANY, return_dict_in_generate=True)
    [result] = output.results
    assert output.sequences.tolist() == [PROMPT + greedy]
    assert result.tokens == greedy and result.prompt_tokens == PROMPT and result.finish_reason == "length"
    assert result.stats.target_verify_forwards > 0 and result.stats.draft_forwards > 0
    assert output["sequences"] is output.sequences and output.scores is None


def test_the_models_themselves_decode_and_no_copy(target):
    assert simsd.load(target.model).model is target.model


def test_other_attention_implementations_and_training_mode_are_no_obstacle(target, greedy, draft):
    config = copy.deepcopy(target.model.config)
    model = type(target.model)._from_config(config, attn_implementation="sdpa").train()
    model.load_state_dict(target.model.state_dict())
    output = model.generate(
        torch.tensor([PROMPT]), custom_generate=simsd.hf_generate, assistant_model=draft.model, max_new_tokens=NEW
    )
    assert output.tolist() == [PROMPT + greedy]
    assert model.training and model.config._attn_implementation == "sdpa"


ROWS = [PROMPT, [7], list(range(10, 19)), [4, 4]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("verify", ["exact", "temporal", "none"])
@pytest.mark.parametrize("sampling", [{}, SAMPLING | {"seed": 9}], ids=["greedy", "sampling"])
def test_each_row_of_a_padded_batch_equals_the_row_alone(run, side, verify, sampling):
    settings = {"verify": verify, "return_dict_in_generate": True} | sampling
    ids, mask = padded(ROWS, side)
    batch = run(ids, attention_mask=mask, **settings)
    assert batch.sequences[:, : mask.shape[1]].tolist() == ids
    for row, given, result in zip(batch.sequences[:, mask.shape[1] :].tolist(), ROWS, batch.results, strict=True):
        alone = run(given, **settings).results[0]
        assert row == alone.tokens + [PAD] * (len(row) - len(alone.tokens))
        assert (result.tokens, result.step_map, result.probs) == (alone.tokens, alone.step_map, alone.probs)


def test_rows_of_a_batch_share_their_forwards(run, target):
    calls = []
    hook = target.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    ids, mask = padded(ROWS, "left")
    try:
        results = run(ids, attention_mask=mask, verify="none", return_dict_in_generate=True).results
    finally:
        hook.remove()
    assert len(calls) == max(result.stats.target_forwards for result in results)


def test_pads_without_a_mask_are_recognised_as_transformers_does(run):
    ids, mask = padded([PROMPT, [7, 8]], "left")
    assert torch.equal(run(ids), run(ids, attention_mask=mask))


def test_rows_that_end_early_are_padded_on_the_right(run, greedy):
    rows = [PROMPT, [7] * len(PROMPT)]
    end = greedy[4]
    batch = run(rows, eos_token_id=end, pad_token_id=33)[:, len(PROMPT) :].tolist()
    for row, ids in zip(rows, batch, strict=True):
        alone = run(row, eos_token_id=end)[0, len(PROMPT) :].tolist()
        assert ids == alone + [33] * (len(ids) - len(alone))
    assert batch[0] == greedy[: greedy.index(end) + 1] + [33] * (len(batch[0]) - greedy.index(end) - 1)


def test_a_model_that_fails_is_not_silent(target, draft):
    model = copy.deepcopy(target.model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(3e38)  # finite, but no sum of it is
    with pytest.warns(UserWarning, match=r"not finite in rows \[0\]"):
        output = model.generate(
            torch.tensor([PROMPT]), custom_generate=simsd.hf_generate, max_new_tokens=NEW, return_dict_in_generate=True
        )
    assert output.results[0].finish_reason == "failed"
