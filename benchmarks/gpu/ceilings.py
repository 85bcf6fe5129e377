"""The two rates that everything else is held against: a large copy and a large bf16 matrix product."""

from __future__ import annotations

import torch

from .. import timing
from ..contest import Bench


def run(bench: Bench) -> None:
    copy_bandwidth(bench)
    matrix_rate(bench)


def copy_bandwidth(bench: Bench) -> None:
    """Device to device, at sizes that no cache holds; the best of them."""
    free = torch.cuda.mem_get_info()[0] if bench.device.type == "cuda" else 2**24
    sizes = [2**16] if bench.tiny else [2**28, 2**30, 2**32]
    for size in (size for size in sizes if 2 * size < 0.8 * free):
        case = f"copy of {size / 2**20:g} MiB"
        if not bench.open(case):
            continue
        source = bench.random(size // 2)
        target = torch.empty_like(source)
        calls = {"copy": [lambda s=source, t=target: t.copy_(s)]}
        taken = timing.measure(calls, bench.device, 5 * bench.seconds, graph=False)["copy"]
        rate = 2 * size / taken.us / 1e3
        bench.add({"case": case, "cells": {"us": f"{taken.us:.1f}", "rate": f"{rate:.0f} GB/s"}, "rate": rate})
        del source, target
    best = max((row["rate"] for row in bench.rows if row["case"].startswith("copy of")), default=0.0)
    if best:
        cells = {"us": "", "rate": f"{best:.0f} GB/s (bytes read and written)"}
        bench.add({"case": "copy bandwidth", "ceiling": "copy_gb_s", "value": best, "cells": cells})


def matrix_rate(bench: Bench) -> None:
    for size in (64,) if bench.tiny else (4096, 8192):
        case = f"product of {size} x {size} bf16"
        if not bench.open(case):
            continue
        pairs = [(bench.random(size, size), bench.random(size, size)) for _ in range(2)]
        calls = {"product": [lambda a=a, b=b: a @ b for a, b in pairs]}
        taken = timing.measure(calls, bench.device, 5 * bench.seconds)["product"]
        rate = 2 * size**3 / taken.us / 1e6
        bench.add({"case": case, "cells": {"us": f"{taken.us:.1f}", "rate": f"{rate:.1f} TFLOP/s"}, "rate": rate})
    best = max((row["rate"] for row in bench.rows if row["case"].startswith("product of")), default=0.0)
    if best:
        cells = {"us": "", "rate": f"{best:.0f} TFLOP/s"}
        bench.add({"case": "matrix product rate", "ceiling": "matmul_tflops", "value": best, "cells": cells})
