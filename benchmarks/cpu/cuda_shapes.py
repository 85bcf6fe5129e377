"""Shared memory that each CUDA kernel is launched with, at sizes of real models and at random ones, as JSON:

    SIMSD_CUDA_EMULATION=$(python tests/emulation.py) python -m benchmarks.cpu.cuda_shapes

Launches are noted and not run, so neither a GPU nor time is needed.
"""

from __future__ import annotations

import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import torch

import simsd_kernels as kernels
from simsd_kernels import dispatch
from simsd_kernels.ops import WITHOUT_CUDA

TESTS = pathlib.Path(__file__).resolve().parents[2] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "ops")]
import plans  # noqa: E402
from every_op import OPS  # noqa: E402

RANDOM_CASES = 60
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALVES)


def calls() -> Iterator[tuple]:
    """(function, arguments) whose launches are looked at."""
    for op in OPS:
        if op.name not in WITHOUT_CUDA:
            for seed in range(RANDOM_CASES):
                yield op.function, op.make(seed)
    for dtype in FLOATS:
        for dim in (64, 96, 128, 256):
            for queries in (1, 8, 16, 2048):  # of 4 rows each: the last are too many to split the keys for
                yield kernels.masked_attention, attention(dtype, dim, queries)
        for dim, rotary in ((128, 128), (256, 64), (255, 128)):
            yield kernels.qk_norm_rope_store, norm(dtype, dim, rotary)
        for dim in (127, 128):
            yield kernels.store_kv, store(dtype, dim)
        for dim in (160, 1024, 2048, 4096, 8192, 16384):
            for odd in (0, 1):
                yield kernels.add_rms_norm, add_norm(dtype, dim - odd)
        for rows in (1, 2, 4, 8, 16, 32, 64, 256):
            for columns in (256, 4096, 12288):
                x, scale = torch.zeros(rows, 4096, dtype=dtype), torch.zeros(columns)
                for scaled in ({}, {"scale": scale}):
                    weight = torch.zeros(columns, 4096, dtype=torch.int8 if scaled else dtype)
                    yield kernels.thin_linear, {"x": x, "weight": weight, **scaled}
                    yield kernels.thin_linear, {"x": x[:, 1:], "weight": weight[:, 1:], **scaled}
        for rows in (2, 4, 8, 16, 32, 64, 128, 256):
            for columns in (256, 1024, 2048):
                for size in (768, 767):
                    given = grouped(dtype, rows, columns, size)
                    yield kernels.grouped_linear, given
                    int8 = {"weight": given["weight"].to(torch.int8), "scale": torch.zeros(4, columns)}
                    yield kernels.grouped_linear, given | int8
    for length, states in ((4, 31), (16, 9), (16, 31), (64, 63)):
        for sampled in (False, True):
            yield kernels.plan_block, plan(length, states, sampled)


def attention(dtype: torch.dtype, dim: int, queries: int) -> dict:
    k = torch.zeros(1, 1, 4096, dim, dtype=dtype)
    lives = torch.zeros(1, 4096, dtype=torch.int32)
    clock = torch.zeros(1, queries, dtype=torch.int32)
    q = torch.zeros(1, 4, queries, dim, dtype=dtype)
    return {"q": q, "k": k, "v": k, "clock": clock, "birth": lives, "death": lives}


def add_norm(dtype: torch.dtype, dim: int) -> dict:
    x, residual, weight = (torch.zeros(*shape, dim, dtype=dtype) for shape in ((4,), (4,), ()))
    return {"x": x, "residual": residual, "weight": weight, "eps": 1e-6}


def grouped(dtype: torch.dtype, rows: int, columns: int, size: int) -> dict:
    weight = torch.zeros(4, columns, size, dtype=dtype)
    offsets = torch.tensor([0, 0, rows, rows, rows], dtype=torch.int32)
    return {"x": torch.zeros(rows, size, dtype=dtype), "weight": weight, "offsets": offsets}


def norm(dtype: torch.dtype, dim: int, rotary: int) -> dict:
    q, k, cache = (torch.zeros(*shape, dim, dtype=dtype) for shape in ((1, 4, 8), (1, 4, 2), (1, 2, 16)))
    turns = torch.zeros(1, 4, rotary, dtype=dtype)
    slots = torch.arange(4, dtype=torch.int32)[None]
    return {
        "q": q, "k": k, "v": k, "q_weight": None, "k_weight": None, "cos": turns, "sin": turns, "k_cache": cache,
        "v_cache": cache.clone(), "slots": slots, "eps": 1e-6,
    }  # fmt: skip


def store(dtype: torch.dtype, dim: int) -> dict:
    k, cache = torch.zeros(1, 2, 4, dim, dtype=dtype), torch.zeros(1, 2, 16, dim, dtype=dtype)
    slots = torch.arange(4, dtype=torch.int32)[None]
    return {"k": k, "v": k, "k_cache": cache, "v_cache": cache.clone(), "slots": slots}


def plan(length: int, states: int, sampled: bool) -> dict:
    drawn = {}
    if sampled:
        logits = torch.zeros(1, 1, length, plans.VOCABULARY)
        drawn = {"draft_logits": logits, "temperature": torch.ones(1), "seed": torch.zeros(1, dtype=torch.int64)}
    return plans.arguments(length=length, max_states=states, **drawn)


def measure() -> dict[str, int]:
    """Kernel, as C++ writes it, to the most bytes of shared memory that a block of it was given."""
    torch.ops.simsd_emulated.set_noting(True)
    for multiprocessors in (4, 132):  # which kernel serves may depend on it
        torch.ops.simsd_emulated.set_multiprocessors(multiprocessors)
        for function, arguments in calls():
            function(**arguments, backend="cuda")
    most: dict[int, int] = {}
    for line in torch.ops.simsd_emulated.take_notes().splitlines():
        address, size, _ = map(int, line.split())
        most[address] = max(most.get(address, 0), size)
    symbols = subprocess.run(["nm", "-C", "--defined-only", dispatch.EMULATION], capture_output=True, text=True).stdout
    names = {int(line.split()[0], 16): line.split(maxsplit=2)[2] for line in symbols.splitlines()}
    return dict(sorted((short(names[address]), size) for address, size in most.items()))


def short(name: str) -> str:
    """`void simsd::linear::(anonymous namespace)::multiply<...>(simsd::linear::Params)` to `linear::multiply<...>`."""
    return re.sub(r"\(anonymous namespace\)::|\(simsd::.*|^void |simsd::", "", name)


if __name__ == "__main__":
    if not dispatch.EMULATION:
        raise SystemExit("needs SIMSD_CUDA_EMULATION=$(python tests/emulation.py)")
    print(json.dumps(measure(), indent=1))
