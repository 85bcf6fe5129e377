from __future__ import annotations

import dataclasses

import pytest

from simsd import GenerationConfig, SimsdError

BAD = [
    ({"strategy": "best"}, "sequential, low_confidence_static, low_confidence_dynamic, entropy_bounded; got 'best'"),
    ({"verify": "exactly"}, "exact, temporal, none; got 'exactly'"),
    ({"drafter": "other"}, "auto, model, self; got 'other'"),
    ({"lookahead": 0}, "lookahead must be an integer in 1..16, got 0"),
    ({"lookahead": 17}, "1..16, got 17"),
    ({"lookahead": None}, "lookahead must be an integer"),
    ({"max_rows": -1}, "max_rows must be an integer >= 0, got -1"),
    ({"max_rows": 1.5}, "max_rows"),
    ({"order_power": -0.5}, "order_power must be a finite number >= 0, got -0.5"),
    ({"order_power": float("inf")}, "order_power"),
    ({"accept": "maybe"}, "match, mrs"),
    ({"rejected_tail": "keep"}, "truncate, truncate_no_bonus, target_argmax, target_argmax_all, draft_argmax"),
    ({"max_new_tokens": -1}, ">= 0, got -1"),
    ({"max_new_tokens": 2.5}, "integer"),
    ({"max_new_tokens": True}, "integer"),
    ({"block_length": 65}, "1..64, got 65"),
    ({"block_length": 4, "steps": 5}, "steps must be an integer in 1..4, got 5"),
    ({"steps": 0}, "got 0"),
    ({"draft_steps": 0}, "draft_steps"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": 0.0}, "above 0"),
    ({"top_p": 1.1}, "0..1, got 1.1"),
    ({"top_k": -1}, "top_k"),
    ({"threshold": 2}, "threshold"),
    ({"end_gate": "high"}, "end_gate"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"end_token_ids": [-3]}, "end_token_ids"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[f"{next(iter(c))}={list(c.values())[-1]}" for c, _ in BAD])
def test_a_bad_value_is_refused_with_the_allowed_ones(changes, message):
    with pytest.raises(SimsdError, match=message.replace("..", r"\.\.")):
        GenerationConfig(**changes)


@pytest.mark.parametrize(
    "changes", [{"accept": "mrs"}, {"rejected_tail": "target_argmax"}, {"end_gate": 0.5}], ids=lambda c: next(iter(c))
)
def test_settings_of_temporal_are_refused_where_exact_would_ignore_them(changes):
    [(name, value)] = changes.items()
    message = f"{name}={value!r} is a setting of verify='temporal'; got verify='exact'"
    with pytest.raises(SimsdError, match=message):
        GenerationConfig(**changes)
    assert getattr(GenerationConfig(verify="temporal", **changes), name) == value


def test_the_default_is_the_verifier_that_keeps_the_text():
    assert (GenerationConfig().verify, GenerationConfig().drafter) == ("exact", "auto")


def test_a_config_cannot_be_changed_behind_its_checks():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GenerationConfig().steps = 99


@pytest.mark.parametrize(
    "length, steps, counts", [(4, 4, [1, 1, 1, 1]), (4, 3, [2, 1, 1]), (8, 3, [3, 3, 2]), (5, 1, [5])]
)
def test_the_remainder_of_a_schedule_goes_to_the_early_steps(length, steps, counts):
    assert GenerationConfig(steps=steps).reveal_counts(length) == counts


def test_without_steps_every_step_reveals_one_position():
    assert GenerationConfig().reveal_counts(5) == [1] * 5


def test_more_steps_than_positions_are_refused_when_the_block_length_is_known():
    with pytest.raises(SimsdError, match="steps must be at most the block length 4, got 6"):
        GenerationConfig(steps=6).reveal_counts(4)
    with pytest.raises(SimsdError, match="draft_steps must be at most the block length 4, got 6"):
        GenerationConfig(draft_steps=6).block_steps(4)
