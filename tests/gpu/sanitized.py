"""Every CUDA kernel on small arguments of a few seeds: what compute-sanitizer is run on."""

from __future__ import annotations

import _pytest.outcomes
import torch
from gpu_cases import BACKENDS, DEVICE, OPS, call, on

SEEDS = (1, 2, 3)


def main() -> None:
    calls = 0
    for op in OPS:
        for backend in BACKENDS[:1]:
            for seed in SEEDS:
                try:
                    call(op, on(DEVICE, op.make(seed)), backend)
                    calls += 1
                except _pytest.outcomes.Skipped as skipped:
                    print(skipped)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    print(f"{calls} calls")


if __name__ == "__main__":
    main()
