"""A record of an iteration with every op on its CUDA kernel, replayed: what a CUDA graph would run, run on the CPU."""

from __future__ import annotations

import json

import pytest
import torch

import simsd
from recorded import Batch, decode, record, request
from simsd import GenerationConfig
from simsd.decode.iteration import Shape
from stand_ins import disturbed, random_sdar

COUNT, CAPACITY, BLOCK, STATES = 2, 32, 4, 4
SHAPE = Shape(
    lookahead=2,
    states=STATES,
    logits_rows=COUNT * STATES * BLOCK,
    draft_blocks=2,
    self_draft=True,
    keeps_logits=True,
    noise=True,
    filters=(True, True),
)
JOBS = [
    ([5, 9, 2, 7, 1, 3], {"max_new_tokens": 9}),
    ([4, 4, 8], {"max_new_tokens": 6, "temperature": 0.8, "seed": 3}),
    ([7], {"max_new_tokens": 9, "temperature": 1.0, "top_k": 20, "top_p": 0.9, "strategy": "low_confidence_dynamic"}),
    ([1, 2], {"max_new_tokens": 7, "strategy": "entropy_bounded", "entropy_bound": 0.5}),
    ([3, 3, 3, 3, 3], {"max_new_tokens": 5, "strategy": "sequential", "steps": 2}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_replays_on_cuda_kernels_give_native_decodings_bits(monkeypatch, dtype):
    monkeypatch.setenv("SIMSD_BACKEND", "cuda")
    models = random_sdar(0), disturbed(random_sdar(0))
    target, draft = (simsd.load(model.model, dtype=dtype, deterministic=True) for model in models)
    graph = record(Batch(target, draft, [SHAPE], COUNT, CAPACITY), SHAPE)
    spaces = {str(node.target).split(".")[0] for node in graph.graph.nodes if node.op == "call_function"}
    assert "simsd_emulated" in spaces and "simsd" not in spaces

    batch = Batch(target, draft, [SHAPE], COUNT, CAPACITY)
    requests = [request(n, target, prompt, **settings) for n, (prompt, settings) in enumerate(JOBS)]
    torch.ops.simsd_emulated.take_counters()
    decoded = decode(batch, lambda _: graph(*batch.tensors), requests, seed=0)
    launches = json.loads(torch.ops.simsd_emulated.take_counters())["launches"]
    assert launches > 50 * decoded.iterations and decoded.accepted > 0

    for mine, (prompt, settings) in zip(decoded.requests, JOBS, strict=True):
        (native,) = simsd.generate(target, [prompt], None, GenerationConfig(verify="none", **settings))
        assert (mine.new, mine.steps, mine.probs) == (native.tokens, native.step_map, native.probs)
