"""Whether models, device and settings fit together, before anything is decoded."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import simsd
from simsd import EngineConfig, GenerationConfig, SimsdError
from simsd.engine.pair import CONTROL_OPS, block_length, check_device, check_pair
from simsd_kernels import dispatch
from stand_ins import random_sdar


@pytest.mark.parametrize("missing", CONTROL_OPS)
def test_a_gpu_without_compiled_control_ops_is_refused_in_one_line_with_the_remedy(missing, monkeypatch):
    known = {(op, "CUDA"): None for op in CONTROL_OPS} | {(missing, "CUDA"): "built without CUDA"}
    monkeypatch.setattr(dispatch, "compiled_obstacle", lambda op, key: known[op, key])
    with pytest.raises(SimsdError, match=f"{missing} is missing: built without CUDA; .*SIMSD_BUILD_CUDA=1") as error:
        check_device(torch.device("cuda", 0))
    assert "\n" not in str(error.value)
    check_device(torch.device("cpu"))


UNLIKE = [
    ({"block_length": 8}, "target .* has block length 4, draft .* 8: use a pair of one block length or set block_len"),
    (
        {"vocab_size": 80},
        "draft .* does not fit target .*: vocab size 80 against 64, which only models with tokenizers may differ in",
    ),
    ({"mask_token_id": 59}, "draft .* does not fit target .*: mask token id 59 against 61, which only"),
]


@pytest.mark.parametrize(("changes", "message"), UNLIKE, ids=[next(iter(changes)) for changes, _ in UNLIKE])
def test_models_that_do_not_fit_together_are_refused(target, changes, message):
    with pytest.raises(SimsdError, match=message) as error:
        simsd.Engine(target, random_sdar(1, **changes))
    assert "\n" not in str(error.value)


def test_a_draft_on_another_device_is_refused(target):
    draft = random_sdar(1)
    draft.model.to("meta")
    with pytest.raises(SimsdError, match='is on meta, not on cpu: load it there, or set draft_device="meta"') as error:
        check_pair(target, draft, target.device)
    assert "\n" not in str(error.value)


def test_an_explicit_block_length_overrides_both_models(target):
    draft = random_sdar(0, block_length=16)
    assert block_length(target, draft, EngineConfig(block_length=8)) == 8
    config = GenerationConfig(max_new_tokens=16, block_length=8, end_token_ids=())
    result = simsd.generate(target, [[1]], draft, config)[0]
    assert len(result.tokens) == 16 and max(result.step_map) > 4


def test_a_set_of_positions_has_64_bits():
    for length in (0, 65):
        wrong = dataclasses.replace(random_sdar(0), block_length=length)
        with pytest.raises(SimsdError, match=rf"block length must be in 1\.\.64, got {length} from SDAR"):
            block_length(wrong, None, EngineConfig())


@pytest.mark.parametrize(
    ("prompt", "new", "fits"), [(500, 12, True), (500, 13, False), (511, 1, True), (512, 1, False)]
)
def test_a_sequence_ends_within_the_models_positions(target, prompt, new, fits):
    """512 of them."""
    engine = simsd.Engine(target, max_length=1024)
    if fits:
        engine.add([1] * prompt, max_new_tokens=new)
        return
    message = f"{prompt} prompt tokens .* {new}, in whole blocks 516, exceed the 512 positions of SDAR.*: shorten the"
    with pytest.raises(SimsdError, match=message):
        engine.add([1] * prompt, max_new_tokens=new)


def test_a_draft_of_fewer_positions_than_the_target_bounds_them(target):
    engine = simsd.Engine(target, random_sdar(1, max_position_embeddings=32), max_length=64)
    engine.add([1] * 24, max_new_tokens=8)
    with pytest.raises(SimsdError, match="in whole blocks 36, exceed the 32 positions"):
        engine.add([1] * 24, max_new_tokens=9)


def test_more_steps_than_a_block_has_positions_are_refused(target):
    engine = simsd.Engine(target, random_sdar(1))
    for name in ("steps", "draft_steps"):
        with pytest.raises(SimsdError, match=f"^{name} must be at most the block length 4, got 5"):
            engine.add([1], **{name: 5})
    assert not engine.busy


def test_an_engine_without_a_draft_refuses_the_model_as_drafter(target):
    engine = simsd.Engine(target)
    with pytest.raises(SimsdError, match="drafter='model' needs a draft model, got None: name one, or use drafter="):
        engine.add([1], drafter="model")
    engine.add([1], drafter="model", verify="none")  # nobody drafts
