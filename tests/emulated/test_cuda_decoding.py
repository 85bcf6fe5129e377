"""The decoding loop with every op on its CUDA kernel, run on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

import simsd
from simsd import GenerationConfig
from stand_ins import disturbed, random_sdar

PROMPTS = [[5, 9, 2, 7, 1, 3], [4, 4, 8]]


@pytest.fixture(autouse=True)
def every_op_on_cuda(monkeypatch):
    monkeypatch.setenv("SIMSD_BACKEND", "cuda")


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def pair(request):
    """A model and another like it, both deterministic."""
    models = random_sdar(0), disturbed(random_sdar(0))
    return tuple(simsd.load(model.model, dtype=request.param, deterministic=True) for model in models)


SETTINGS = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "seed": 3},
    "filtered": {"temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 1, "strategy": "low_confidence_dynamic"},
    "self": {"drafter": "self", "strategy": "entropy_bounded", "threshold": 0.5},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_exact_decoding_gives_native_decodings_bits(pair, name):
    target, draft = pair
    common = {"max_new_tokens": 9, **SETTINGS[name]}
    drafter = {"drafter": common.pop("drafter", "model")}
    native = simsd.generate(target, PROMPTS, None, GenerationConfig(verify="none", **common))
    torch.ops.simsd_emulated.take_counters()
    exact = simsd.generate(target, PROMPTS, draft, GenerationConfig(verify="exact", **drafter, **common))
    assert json.loads(torch.ops.simsd_emulated.take_counters())["launches"] > 100
    for a, b in zip(native, exact, strict=True):
        assert (a.tokens, a.step_map, a.probs) == (b.tokens, b.step_map, b.probs)
    assert sum(result.stats.accepted for result in exact) > 0


def test_temporal_decoding_runs(pair):
    target, draft = pair
    for accept, temperature in (("match", 0.0), ("mrs", 1.0)):
        config = GenerationConfig(verify="temporal", accept=accept, temperature=temperature, max_new_tokens=9)
        for result in simsd.generate(target, PROMPTS, draft, config):
            assert len(result.tokens) >= 9 and all(p > 0 for p in result.probs)
