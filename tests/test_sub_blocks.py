"""Decoding a block by sub-blocks: Fast-dLLM v2's own ones, and those that a request asks of any model."""

from __future__ import annotations

import pytest

import simsd
from simsd import SimsdError
from small_checkpoints import edit_json
from test_families import MASK, load, stock_folder, write

pytestmark = pytest.mark.usefixtures("one_thread")


def step_maps(loaded: simsd.LoadedModel, prompt: list[int], **settings) -> list[int]:
    """Of two blocks decoded as fast as may be: every position is above the threshold."""
    fast = {"strategy": "low_confidence_dynamic", "threshold": 0.0, "end_token_ids": (), "verify": "none"}
    return simsd.generate(loaded, [prompt], max_new_tokens=16, **fast, **settings)[0].step_map


def test_a_published_configuration_says_all_that_decoding_by_sub_blocks_needs(tmp_path):
    """That of Fast_dLLM_v2_7B, but for sizes."""
    folder = write(tmp_path, "fast_dllm_v2")
    edit_json(folder / "config.json", bd_size=32, eos_token_id=None)
    loaded = simsd.load(folder, mask_token_id=MASK)
    assert (loaded.block_length, loaded.shift, loaded.end_token_ids) == (32, True, (151645,))
    assert step_maps(loaded, []) == [1, *[2] * 7, *[3] * 8]
    with pytest.raises(SimsdError, match="mask_token_id must be an id from 0 to 47, got 151665"):
        simsd.load(folder)


@pytest.mark.parametrize("prompt, expected", [(0, [1, 2, 2, 2, 3, 3, 3, 3] * 2), (8, [1, 2, 2, 2, 3, 3, 3, 3] * 2)])
def test_a_blocks_first_token_comes_alone_then_one_sub_block_after_the_other(prompt, expected, tmp_path):
    loaded = load(write(tmp_path, "fast_dllm_v2"), "fast_dllm_v2")
    assert step_maps(loaded, [5] * prompt, sub_block_length=4) == expected


def test_sub_blocks_are_counted_from_the_blocks_begin_not_the_prompts_end(tmp_path):
    loaded = load(write(tmp_path, "fast_dllm_v2"), "fast_dllm_v2")
    assert step_maps(loaded, [5] * 3, sub_block_length=4)[:6] == [1, 2, 2, 2, 2, 1]
    assert step_maps(loaded, [5] * 3, sub_block_length=8)[:6] == [1, 1, 1, 1, 1, 1]  # none
    assert step_maps(loaded, [5] * 3, sub_block_length=1)[:6] == [1, 2, 3, 4, 5, 1]


def test_sub_blocks_stay_the_models_own_in_training_mode_in_a_copy_and_as_a_fine_tune(tmp_path):
    folder = write(tmp_path / "in", "fast_dllm_v2")
    edit_json(folder / "config.json", sub_block_length=4)
    loaded = load(folder, "fast_dllm_v2")
    expected = [1, 2, 2, 2, 3, 3, 3, 3] * 2
    loaded.model.train()
    assert step_maps(loaded, []) == expected
    loaded.model.save_pretrained(tmp_path / "out")
    assert step_maps(simsd.load(tmp_path / "out"), []) == expected
    simsd.load(loaded.model, shift=False).model.save_pretrained(tmp_path / "unshifted")
    assert not simsd.load(tmp_path / "unshifted").shift
    plain = stock_folder(tmp_path / "plain", "a2d_qwen2", model_type="qwen2")
    tuned = simsd.load(plain, family="fast_dllm_v2", block_length=8, mask_token_id=MASK)
    assert tuned.shift and step_maps(tuned, [], sub_block_length=4) == expected


def test_models_without_sub_blocks_take_them_on_request(tmp_path):
    loaded = load(write(tmp_path, "a2d_qwen2"), "a2d_qwen2", shift=True)
    assert step_maps(loaded, []) == [1] * 16
    assert step_maps(loaded, [], sub_block_length=4) == [1, 1, 1, 1, 2, 2, 2, 2] * 2


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sub_block_length": 9}, "sub_block_length must be at most the block length 8, got 9"),
        ({"steps": 1}, "steps must be at least 2, the sub-blocks of a block, got 1"),
        ({"sub_block_length": 2, "steps": 4}, "steps must be at least 5, the sub-blocks of a block, got 4"),
        ({"strategy": "entropy_bounded", "steps": 7}, "needs a step per token .* leave steps out or give 8, got 7"),
    ],
)
def test_steps_that_sub_blocks_leave_no_room_for_are_refused_in_one_line(settings, message, tmp_path):
    loaded = load(write(tmp_path, "fast_dllm_v2"), "fast_dllm_v2")
    with pytest.raises(SimsdError, match=message) as error:
        simsd.generate(loaded, [[5]], **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sub_block_length": 0}, "sub_block_length must be an integer of at least 1, got 0"),
        ({"sub_block_length": "8"}, "sub_block_length must be an integer of at least 1, got '8'"),
        ({"sub_block_length": 2.5}, "sub_block_length must be an integer of at least 1, got 2.5"),
        ({"sub_block_length": True}, "sub_block_length must be an integer of at least 1, got True"),
        ({"first_token_alone": "yes"}, "first_token_alone must be true or false, got 'yes'"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": None},
            "every layer must have full_attention",
        ),
    ],
)
def test_a_fast_dllm_configuration_that_cannot_be_honoured_is_refused_in_one_line(changes, message, tmp_path):
    folder = write(tmp_path, "fast_dllm_v2")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(SimsdError, match=message) as error:
        load(folder, "fast_dllm_v2")
    assert "\n" not in str(error.value)
