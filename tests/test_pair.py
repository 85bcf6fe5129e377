"""Whether models, device and settings fit together, before anything is decoded."""

from __future__ import annotations

import pytest
import torch

import simsd
from simsd import SimsdError
from simsd.engine.pair import CONTROL_OPS, check_device
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


def test_a_request_longer_than_the_engine_is_refused_with_the_figures():
    engine = simsd.Engine(random_sdar(0), max_length=16)
    with pytest.raises(
        SimsdError, match="5 prompt tokens .* 12, in whole blocks 20, exceed the engine's max_length 16"
    ):
        engine.add([1, 2, 3, 4, 5], max_new_tokens=12)
    assert not engine.busy
    assert len(engine.generate([[1, 2, 3, 4, 5]], max_new_tokens=8)[0].tokens) <= 8


def test_settings_are_the_request_s_or_the_engine_s():
    engine = simsd.Engine(random_sdar(0))
    with pytest.raises(SimsdError, match="unknown setting 'lookahead'"):
        engine.add([1], lookahead=2)
    with pytest.raises(SimsdError, match="unknown setting 'temperature'"):
        simsd.Engine(random_sdar(0), temperature=1.0)
