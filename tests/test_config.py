from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from simsd import GenerationConfig, SimsdError
from simsd.config import config_with

BAD = [
    ({"strategy": "best"}, "sequential, low_confidence_static, low_confidence_dynamic, entropy_bounded; got 'best'"),
    ({"verify": "exactly"}, "exact, temporal, none; got 'exactly'"),
    ({"drafter": "other"}, "auto, model, self, lookup; got 'other'"),
    ({"lookahead": 0}, "lookahead must be an integer in 1..16, got 0"),
    ({"lookahead": 17}, "1..16, got 17"),
    ({"lookahead": None}, "lookahead must be an integer"),
    ({"max_rows": -1}, "max_rows must be an integer >= 0, got -1"),
    ({"max_rows": 1.5}, "max_rows"),
    ({"order_head": ""}, "order_head must be auto, none or a file of simsd train-order, got ''"),
    ({"order_head": True}, "order_head must be auto, none or a file of simsd train-order, got True"),
    ({"order_head": None}, "order_head must be auto, none or a file of simsd train-order, got None"),
    ({"max_queue": -1}, "max_queue must be an integer >= 0, got -1"),
    ({"max_queue": True}, "max_queue must be an integer >= 0"),
    ({"max_batch": 0}, "max_batch must be an integer >= 1, got 0"),
    ({"max_batch": True}, "max_batch must be an integer >= 1"),
    ({"max_batch": 2.0}, "max_batch must be an integer >= 1"),
    ({"order_sharpness": -0.5}, "order_sharpness must be a number in 0..3.40282e.38, got -0.5"),
    ({"order_sharpness": 1e39}, "order_sharpness must be a number in 0..3.40282e.38"),
    ({"order_sharpness": float("inf")}, "order_sharpness"),
    ({"accept": "maybe"}, "match, mrs"),
    ({"rejected_tail": "keep"}, "truncate, truncate_no_bonus, target_argmax, target_argmax_all, draft_argmax"),
    ({"max_new_tokens": -1}, ">= 0, got -1"),
    ({"max_new_tokens": 2.5}, "integer"),
    ({"max_new_tokens": True}, "integer"),
    ({"block_length": 65}, "1..64, got 65"),
    ({"block_length": 4, "steps": 5}, "steps must be an integer in 1..4, got 5"),
    ({"steps": 0}, "got 0"),
    ({"draft_steps": 0}, "draft_steps"),
    ({"sub_block_length": 0}, "sub_block_length must be an integer in 1..64, got 0"),
    ({"sub_block_length": 65}, "sub_block_length must be an integer in 1..64, got 65"),
    ({"sub_block_length": 5, "block_length": 4}, "sub_block_length must be an integer in 1..4, got 5"),
    ({"sub_block_length": "8"}, "sub_block_length must be an integer in 1..64, got '8'"),
    ({"sub_block_length": True}, "sub_block_length must be an integer"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": 1e39}, "temperature must be 0 .greedy. or in 1e-30..3.40282e.38, so that .* float32, got 1e.39"),
    ({"temperature": 1e-40}, "0 .greedy. or in 1e-30..3.40282e.38, so that .* float32, got 1e-40"),
    ({"temperature": 10**400}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": None}, "temperature"),
    ({"temperature": [1.0, 0.5]}, "temperature"),
    ({"entropy_bound": 1e39}, "entropy_bound"),
    ({"top_p": 0.0}, "above 0"),
    ({"top_p": 1.1}, "0..1, got 1.1"),
    ({"top_k": -1}, "top_k"),
    ({"max_new_tokens": np.float64(8.0)}, "integer"),
    ({"max_new_tokens": np.bool_(True)}, "integer"),
    ({"max_new_tokens": torch.tensor([8])}, "integer"),
    ({"threshold": 2}, "threshold"),
    ({"end_gate": "high"}, "end_gate"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "x"}, "seed must be an integer in .*, one per prompt, or None, got 'x'"),
    ({"seed": b"x"}, "seed"),
    ({"seed": 1.5}, "seed must be an integer .*, got 1.5"),
    ({"seed": np.float32(3)}, "seed"),
    ({"seed": True}, "seed"),
    ({"seed": torch.tensor(True)}, "seed"),
    ({"seed": [1, None]}, "seed"),
    ({"seed": {1, 2}}, "seed"),
    ({"seed": [[1, 2]]}, "seed"),
    ({"end_token_ids": [-3]}, "end_token_ids"),
    ({"end_token_ids": "ab"}, "end_token_ids must be a list of token ids, got 'ab'"),
    ({"end_token_ids": 1.0}, "end_token_ids"),
    ({"end_token_ids": [2**31]}, "end_token_ids"),
    ({"n": 0}, "n must be an integer >= 1, got 0"),
    ({"n": None}, "n must be"),
    ({"stop": [""]}, "stop must be a list of strings, none of them empty"),
    ({"stop": ["a", 1]}, "stop must be a list of strings"),
    ({"stop": b"a"}, "stop must be a list of strings"),
    ({"stop": {"a"}}, "stop must be a list of strings"),
    ({"strategy": np.array(["sequential"])}, "strategy must be one of"),
    ({"verify": None}, "verify must be one of"),
]


@pytest.mark.parametrize("changes, message", BAD, ids=[f"{next(iter(c))}={list(c.values())[-1]!r:.20}" for c, _ in BAD])
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


@pytest.mark.parametrize(
    "sub_blocks, steps, counts",
    [
        ([4, 4], 4, [2, 2, 2, 2]),
        ([4, 4], 3, [2, 2, 4]),
        ([3, 3, 2], 3, [3, 3, 2]),
        ([3, 3, 2], 5, [2, 1, 2, 1, 2]),
        ([1, 7, 8], 3, [1, 7, 8]),
        ([1, 7, 8], 5, [1, 4, 3, 4, 4]),
        ([1, 7, 8], None, [1] * 16),
        ([8], 3, [3, 3, 2]),
    ],
)
def test_steps_are_shared_out_over_sub_blocks(sub_blocks, steps, counts):
    assert GenerationConfig(steps=steps).reveal_counts(sum(sub_blocks), sub_blocks) == counts


@pytest.mark.parametrize("sub_block_length", range(1, 33))
@pytest.mark.parametrize("steps", [2, 5, 8, 13, 32])
def test_no_step_before_the_last_is_left_with_more_than_its_sub_block(sub_block_length, steps):
    sub_blocks = [min(sub_block_length, 32 - first) for first in range(0, 32, sub_block_length)]
    if steps < len(sub_blocks):
        with pytest.raises(SimsdError, match=f"steps must be at least {len(sub_blocks)}, .*sub-blocks.*, got {steps}"):
            GenerationConfig(steps=steps).reveal_counts(32, sub_blocks)
        return
    counts = GenerationConfig(steps=steps).reveal_counts(32, sub_blocks)
    assert len(counts) == steps and min(counts) >= 1
    ends = set(itertools.accumulate(counts))
    assert ends >= set(itertools.accumulate(sub_blocks))


def test_steps_that_cannot_fill_sub_blocks_are_refused():
    config = GenerationConfig(steps=4, strategy="entropy_bounded")
    with pytest.raises(SimsdError, match="strategy='entropy_bounded' needs a step per token.* give 8, got 4"):
        config.reveal_counts(8, [4, 4])
    assert config.reveal_counts(8) == config.reveal_counts(8, [8]) == [2, 2, 2, 2]


def test_without_steps_every_step_reveals_one_position():
    assert GenerationConfig().reveal_counts(5) == [1] * 5


def test_more_steps_than_positions_are_refused_when_the_block_length_is_known():
    with pytest.raises(SimsdError, match="steps must be at most the block length 4, got 6"):
        GenerationConfig(steps=6).reveal_counts(4)
    with pytest.raises(SimsdError, match="draft_steps must be at most the block length 4, got 6"):
        GenerationConfig(draft_steps=6).block_steps(4)
    with pytest.raises(SimsdError, match="sub_block_length must be at most the block length 4, got 6"):
        GenerationConfig(sub_block_length=6).block_steps(4)


NUMBERS = {
    "numpy": {
        "max_new_tokens": np.int64(8),
        "block_length": np.uint8(4),
        "steps": np.int32(2),
        "top_k": np.int16(3),
        "temperature": np.float64(0.5),
        "top_p": np.float32(0.5),
        "threshold": np.array(0.25),
        "seed": np.uint32(7),
        "n": np.int8(2),
        "lookahead": np.int64(3),
        "end_token_ids": np.array([1, 2]),
    },
    "torch": {
        "max_new_tokens": torch.tensor(8),
        "block_length": torch.tensor(4, dtype=torch.uint8),
        "steps": torch.tensor(2),
        "top_k": torch.tensor(3),
        "temperature": torch.tensor(0.5),
        "top_p": torch.tensor(0.5, dtype=torch.bfloat16),
        "threshold": torch.tensor(0.25, dtype=torch.float64),
        "seed": torch.tensor(7, dtype=torch.int32),
        "n": torch.tensor(2),
        "lookahead": torch.tensor(3),
        "end_token_ids": torch.tensor([1, 2]),
    },
}


@pytest.mark.parametrize("values", NUMBERS.values(), ids=NUMBERS)
def test_numpy_s_and_torch_s_scalars_are_the_numbers_that_they_hold(values):
    plain = GenerationConfig(
        max_new_tokens=8,
        block_length=4,
        steps=2,
        top_k=3,
        temperature=0.5,
        top_p=0.5,
        threshold=0.25,
        seed=7,
        n=2,
        lookahead=3,
        end_token_ids=[1, 2],
    )
    assert GenerationConfig(**values) == plain
    assert {type(getattr(GenerationConfig(**values), name)) for name in values} == {int, float, tuple}


@pytest.mark.parametrize(
    "seed",
    [[3, 4], (3, 4), range(3, 5), np.array([3, 4]), torch.tensor([3, 4]), [np.int64(3), torch.tensor(4)]],
    ids=repr,
)
def test_seeds_may_be_any_list_of_integers(seed):
    assert GenerationConfig(seed=seed).seeds(2) == [3, 4]


def test_one_end_token_and_one_stop_string_need_no_list():
    config = GenerationConfig(end_token_ids=5, stop="\n")
    assert (config.end_token_ids, config.stop) == ((5,), ("\n",))
    assert GenerationConfig(stop=None).stop == GenerationConfig(stop=[]).stop == ()
    assert GenerationConfig(end_token_ids=None).end_token_ids is None and GenerationConfig(end_token_ids=()) != config


def test_without_a_seed_every_prompt_gets_a_fresh_one_whatever_torch_s_seed_is():
    drawn = []
    for _ in range(3):
        torch.manual_seed(0)
        drawn += GenerationConfig(seed=None).seeds(2)
    assert len(set(drawn)) == 6
    assert all(GenerationConfig(seed=seed).seeds(1) == [seed] for seed in drawn)


def test_settings_override_a_config_or_a_dict_of_them():
    base = GenerationConfig(max_new_tokens=8, temperature=0.5)
    for config in (base, {"max_new_tokens": 8, "temperature": 0.5}, dataclasses.asdict(base)):
        assert config_with(config, {}) == base
        assert config_with(config, {"temperature": 1}) == GenerationConfig(max_new_tokens=8, temperature=1.0)
    assert config_with(None, {}) == GenerationConfig() and config_with(base, {}) is base


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (None, {"max_tokens": 8}, "unknown setting 'max_tokens': did you mean max_new_tokens"),
        (None, {"temp": 1}, "unknown setting 'temp': did you mean temperature?"),
        (None, {"stop_strings": ["a"]}, "unknown setting 'stop_strings': did you mean .*stop"),
        ({"top_pp": 1}, {}, "unknown setting 'top_pp': did you mean top_p"),
        ({1: 1}, {}, "unknown setting 1: there are max_new_tokens, .*, max_batch"),
        (None, {"max_batch_size": 1}, "did you mean max_batch"),
        (3, {}, "config must be a simsd.GenerationConfig, a dict of settings or None, got builtins.int"),
        ({"temperature": -1}, {}, "temperature must be"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_an_unknown_setting_is_refused_with_those_close_to_it(config, settings, message):
    with pytest.raises(SimsdError, match=message.replace("?", r"\?")):
        config_with(config, settings, others=("max_batch",))


def test_transformers_own_config_is_not_taken_for_ours():
    import transformers

    with pytest.raises(SimsdError, match="got transformers.GenerationConfig"):
        config_with(transformers.GenerationConfig(), {})
