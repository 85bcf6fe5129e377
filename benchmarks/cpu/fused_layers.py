"""A native forward of tiny-target through the fused layers against one through transformers' modules, and what rows
that do not notice each other cost.

Each forward runs blocks of 4 rows behind 120 tokens, as native decoding does. The contestants take turns of several
forwards, whose first is not counted: it finds another's weights in the cache. What is measured at first is measured
again for each instruction set that the machine has besides its best, in processes of their own:

    SIMSD_CPU_CAPABILITY=avx2 python -m benchmarks.cpu.fused_layers SETTINGS
"""

from __future__ import annotations

import json
import sys

import torch

import simsd
from simsd.models.fused import layers_of
from simsd.models.runner import ModelRunner
from simsd.models.stock import StockLayers
from simsd_kernels import INF

from ..contest import Bench
from ..processes import run as run_command
from ..report import Table
from ..timing import measure

BLOCK, CONTEXT, KV_SLOTS = 4, 120, 512
TURN = 5  # forwards
TARGET_MS = {4: 0.8}  # float32, fused
CAPABILITIES = ("portable", "avx2", "avx512")
STOCK = Table(
    [
        ("rows", "{rows}"),
        *((name, f"{{ms[{name}]:.2f}} ({{best_ms[{name}]:.2f}})") for name in ("stock modules", "fused")),
        ("ratio", "{ratio:.2f}"),
        ("target", "at most {target:.1f}"),
    ],
    "Fused layers against transformers' modules, float32, rows that do not notice each other:",
)
PRICE = Table(
    [
        *(("kernels", "{kernels}"), ("dtype", "{dtype}"), ("rows", "{rows}")),
        ("torch's products", "{ms[fused, torch's products]:.2f} ({best_ms[fused, torch's products]:.2f})"),
        ("thin_linear", "{ms[fused]:.2f} ({best_ms[fused]:.2f})"),
        ("ratio", "{ratio:.2f}"),
    ],
    "What such rows cost: the fused layers by `thin_linear` and by torch's products.",
)


def forward(model: simsd.LoadedModel, rows: int, layers=layers_of):
    """A native forward of rows / 4 sequences, ready to call."""
    batch = rows // BLOCK
    runner = ModelRunner(model, batch, KV_SLOTS, layers=layers)
    generator = torch.Generator().manual_seed(0)
    for values in (runner.cache.keys, runner.cache.values):  # the context, the same for all
        values.normal_(generator=generator)
    tokens = torch.randint(5, model.vocab_size, (batch, BLOCK), generator=generator)
    positions = torch.arange(CONTEXT, CONTEXT + BLOCK, dtype=torch.int32).repeat(batch, 1)
    place = torch.arange(KV_SLOTS, dtype=torch.int32)
    birth = torch.where(place < CONTEXT + BLOCK, place // BLOCK, INF).to(torch.int32).repeat(batch, 1)
    arguments = tokens, positions, positions, positions // BLOCK, birth, torch.full_like(birth, INF)
    return lambda: runner.forward(*arguments, torch.arange(rows))


def contestants(dtype: str, rows: int) -> dict:
    thin, plain = (simsd.load("tiny-target", dtype=dtype, deterministic=choice) for choice in (True, False))
    calls = {"fused": forward(thin, rows), "fused, torch's products": forward(plain, rows)}
    if dtype == "float32":
        calls["stock modules"] = forward(thin, rows, StockLayers)
        calls["stock modules, torch's products"] = forward(plain, rows, StockLayers)
    logits = [call().float() for call in calls.values()]
    for other in logits[1:]:
        assert (other - logits[0]).norm() < 0.05 * logits[0].norm(), "the contestants disagree"
    return calls


@torch.inference_mode()
def measured(seconds: float, rows: list[int], dtypes: list[str]) -> list[dict]:
    """`seconds`: of measuring per dtype and number of rows."""
    found = []
    for dtype in dtypes:
        for count in rows:
            calls = {name: [call] for name, call in contestants(dtype, count).items()}
            taken = measure(calls, torch.device("cpu"), seconds, least=2 * TURN, turn=TURN)
            ms = {name: one.us / 1e3 for name, one in taken.items()}
            best = {name: one.best_us / 1e3 for name, one in taken.items()}
            forwards = taken["fused"].samples
            found.append({"dtype": dtype, "rows": count, "forwards": forwards, "ms": ms, "best_ms": best})
    return found


def measured_with(bench: Bench, capability: str, settings: dict) -> list[dict]:
    command = [sys.executable, "-m", "benchmarks.cpu.fused_layers", json.dumps(settings)]
    variables = {"SIMSD_CPU_CAPABILITY": capability}
    ran = run_command(command, bench.time_left(), bench.logs / f"fused_layers_{capability}.log", variables)
    if ran.code:
        raise RuntimeError(f"with {capability}: exit status {ran.code}, see fused_layers_{capability}.log")
    return json.loads(ran.said.splitlines()[-1])


def run(bench: Bench, seconds: float, rows: list[int], dtypes: list[str]) -> None:
    settings = {"seconds": seconds, "rows": rows, "dtypes": dtypes}
    best = torch.ops.simsd._cpu_capability()
    others = CAPABILITIES[: CAPABILITIES.index(best)]
    found = {best: measured(**settings)}
    threads = {"threads": torch.get_num_threads()}
    found |= {other: measured_with(bench, other, settings | threads) for other in reversed(others)}
    for one in found[best]:
        if "stock modules" in one["ms"]:
            ratio = one["ms"]["fused"] / one["ms"]["stock modules"]
            bench.row(STOCK, **one, ratio=ratio, target=TARGET_MS.get(one["rows"]))
    for capability, rows_found in found.items():
        for one in rows_found:
            price = one["ms"]["fused"] / one["ms"]["fused, torch's products"]
            bench.row(PRICE, kernels=capability, **one, ratio=price)


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given.pop("threads"))
    print(json.dumps(measured(**given)))
