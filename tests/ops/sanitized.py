"""Every CUDA kernel, or those of the ops that are named, on small arguments of a few seeds: for compute-sanitizer.

compute-sanitizer --tool racecheck python tests/ops/sanitized.py thin_linear
"""

from __future__ import annotations

import sys

import _pytest.outcomes
import torch

from backends import BACKENDS, DEVICE
from every_op import OPS, call, on

SEEDS = (1, 2, 3)


def main(names: list[str]) -> None:
    if unknown := set(names) - {op.name for op in OPS}:
        raise SystemExit(f"unknown {', '.join(sorted(unknown))}: choose from {', '.join(op.name for op in OPS)}")
    for op in OPS:
        if names and op.name not in names:
            continue
        calls = 0
        for seed in SEEDS:
            try:
                call(op, on(DEVICE, op.make(seed)), BACKENDS[-1])
                calls += 1
            except _pytest.outcomes.Skipped as skipped:
                print(skipped)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        print(f"{op.name}: {calls} calls", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
