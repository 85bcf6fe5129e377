"""What top-k and top-p cost rows of a vocabulary of 151,936 ids, counted on the emulated CUDA kernels, as JSON:

    SIMSD_CUDA_EMULATION=$(python tests/emulation.py) python -m benchmarks.cpu.filter_counts

Blocks and bytes are counted where kernels run on a CPU, so no GPU is needed.
"""

from __future__ import annotations

import json

import torch

import simsd_kernels as kernels
from simsd_kernels import dispatch

from ..report import Table

VOCABULARY = 151_936
ROWS = (1, 8, 64)
FILTERS = {"top-k 50": (50, 1.0), "top-p 0.9": (0, 0.9), "top-k 50, top-p 0.9": (50, 0.9), "neither": (0, 1.0)}
# How many times a call read a row as of commit 85d77a6, where one block filtered it; of 64 rows, counted the same way.
READS_BEFORE = {"top-k 50": 3.0, "top-p 0.9": 7.0, "top-k 50, top-p 0.9": 4.1, "neither": 1.2}
TABLE = Table(
    [
        *(("filter", "{filter}"), ("rows", "{rows}")),
        *(("launches for it", "{launches}"), ("blocks", "{blocks}"), ("before", "{rows}")),
        *(("times that the call reads a row", "{reads:.1f}"), ("for 64 rows before", "{reads_before:.1f}")),
    ],
    "Filters of rows of 151,936 ids in bfloat16",
)


def counted(logits: torch.Tensor, top_k: int | None, top_p: float | None) -> dict[str, int]:
    """What one `block_verify` of these rows does, one position each; without filters where they are None."""
    rows = logits.shape[0]

    def every(value, dtype):
        return None if value is None else torch.full((rows,), value, dtype=dtype)

    nothing = torch.zeros(rows, 1, dtype=torch.int64)
    torch.ops.simsd_emulated.take_counters()
    kernels.block_verify(
        *(logits[:, None], nothing, every(0, torch.int32), every(0, torch.int64), every(1.0, torch.float32)),
        *(every(top_k, torch.int32), every(top_p, torch.float32), every(1, torch.int64)),
        *(torch.arange(rows, dtype=torch.int32)[:, None], nothing),
        backend="cuda",
    )
    return json.loads(torch.ops.simsd_emulated.take_counters())


def count() -> list[dict]:
    """For each filter and number of rows of normal logits (standard deviation 3, bfloat16): launches and blocks that
    filters add to a call, and how many times the row's bytes it reads in all."""
    found = []
    for what, (top_k, top_p) in FILTERS.items():
        for rows in ROWS:
            generator = torch.Generator().manual_seed(0)
            logits = (torch.randn(rows, VOCABULARY, generator=generator) * 3).bfloat16()
            given, without = counted(logits, top_k, top_p), counted(logits, None, None)
            found.append(
                {
                    "filter": what,
                    "rows": rows,
                    "launches": given["launches"] - without["launches"],
                    "blocks": given["blocks"] - without["blocks"],
                    "reads": given["loaded_bytes"] / (rows * VOCABULARY * logits.itemsize),
                    "reads_before": READS_BEFORE[what],
                }
            )
    return found


if __name__ == "__main__":
    if not dispatch.EMULATION:
        raise SystemExit("set SIMSD_CUDA_EMULATION: see tests/emulation.py")
    print(json.dumps(count()))
