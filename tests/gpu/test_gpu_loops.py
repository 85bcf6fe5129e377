"""Decoding on the GPU: the built-in pair writes what it writes on the CPU, in every mode and batch."""

from __future__ import annotations

import time

import pytest
import torch

import simsd
from backends import DEVICE, needs_gpu
from simsd import tasks
from simsd.benchmarking import MODES
from simsd.stopwatch import Stopwatch

PROMPTS = [task.prompt for family in tasks.FAMILIES for task in tasks.held_out(family, 2, 0)]


@pytest.fixture(scope="module")
def pair():
    return [simsd.load(name, device=DEVICE) for name in ("tiny-target", "tiny-draft")]


@pytest.fixture(scope="module")
def texts():
    config = simsd.GenerationConfig(verify="none", max_new_tokens=48)
    return [result.tokens for result in simsd.generate(simsd.load("tiny-target"), PROMPTS, None, config)]


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("mode", ["native", "exact-model", "exact-self", "exact-auto", "temporal"])
def test_texts_are_those_of_the_cpu(pair, texts, mode, batch):
    config = simsd.GenerationConfig(max_new_tokens=48, **MODES[mode])
    results = simsd.generate(pair[0], PROMPTS, pair[1], config, max_batch=batch)
    assert all(result.finish_reason in ("end", "length") for result in results)
    # Rounding is another there, so a near tie may fall the other way: one text of eight, no more.
    differ = [i for i, result in enumerate(results) if result.tokens != texts[i]]
    assert len(differ) <= 1, differ


def test_sampling_repeats_with_its_seed(pair):
    config = simsd.GenerationConfig(max_new_tokens=32, temperature=0.8, top_k=20, seed=5, drafter="model")
    first, second = (simsd.generate(pair[0], PROMPTS[:3], pair[1], config) for _ in range(2))
    assert [result.tokens for result in first] == [result.tokens for result in second]


@needs_gpu
def test_a_stopwatch_measures_the_work_and_not_its_launch():
    x = torch.randn(4096, 4096, device=DEVICE)
    torch.cuda.synchronize()
    watch, began = Stopwatch(x.device), time.perf_counter()
    for _ in range(50):
        x = (x @ x).clamp(-1, 1)
    launched = time.perf_counter() - began
    watch.stop()
    torch.cuda.synchronize()
    whole = time.perf_counter() - began
    assert launched < watch.seconds() <= whole
