"""Counts what masked_attention's CUDA kernels read and write at the sizes of SDAR-8B in bfloat16, as JSON:

    SIMSD_CUDA_EMULATION=$(python tests/emulation.py) python -m benchmarks.cpu.attention_counts

The kernels run in the emulation without their products; every copy to shared memory and every partial result that is
stored or loaded is counted, launch by launch, on an H100's number of multiprocessors. Where K and V are more than FULL
bytes only BLOCKS blocks run, and their bytes stand for those of all. What lies in no counted copy, the output and the
plan or births and deaths, counts with its size. No GPU is needed.
"""

from __future__ import annotations

import dataclasses
import json

import torch

from simsd_kernels import INF, dispatch
from simsd_kernels.attention_plan.size import SPLIT_KEYS, row_tiles

from ..contest import Bench
from ..report import Table
from . import cuda_resources

MULTIPROCESSORS = 132
KV_HEADS, GROUP, DIM = 8, 4, 128
MOST_ROWS = 128  # that a block takes
BATCHES, KEYS, ROWS = (1, 8, 64), (1024, 4096, 32768), (16, 64, 128, 256)
FULL, BLOCKS = 2**27, 6


@dataclasses.dataclass(frozen=True)
class Case:
    batch: int
    keys: int
    rows: int  # packed: queries times query heads of a KV head

    @property
    def kv_bytes(self) -> int:
        return 2 * 2 * self.batch * KV_HEADS * self.keys * DIM

    @property
    def q_bytes(self) -> int:
        return 2 * self.batch * KV_HEADS * self.rows * DIM

    @property
    def blocks(self) -> int:
        """As many as there is work for, or as an H100 has multiprocessors."""
        parts = self.batch * -(-self.keys // SPLIT_KEYS) * row_tiles(self.batch, self.rows, self.keys)
        return min(KV_HEADS * parts, MULTIPROCESSORS)


@dataclasses.dataclass(frozen=True)
class Count:
    """
    Attributes:
        blocks: that read K and V.
        memory: bytes from and to memory, over K, V, queries and output once; None where blocks that share keys did not
            all run.
        written, read: partial results, over K and V. again: of K, V and queries what more than one block read, over K
            and V: from L2.
    """

    blocks: int
    memory: float | None
    written: float
    read: float
    again: float | None


# Of commit 4759be4, counted the same way on its kernels: blocks, written.
BEFORE: dict[tuple[int, int, int], tuple[int, float]] = {  # by batch, keys, rows
    (1, 1024, 16): (32, 0.063),
    (1, 1024, 64): (32, 0.254),
    (1, 1024, 128): (64, 0.508),
    (1, 1024, 256): (128, 1.016),
    (1, 4096, 16): (128, 0.063),
    (1, 4096, 64): (128, 0.254),
    (1, 4096, 128): (256, 0.508),
    (1, 4096, 256): (512, 1.016),
    (1, 32768, 16): (1024, 0.063),
    (1, 32768, 64): (8, 0.000),
    (1, 32768, 128): (8, 0.000),
    (1, 32768, 256): (16, 0.000),
    (8, 1024, 16): (256, 0.063),
    (8, 1024, 64): (256, 0.254),
    (8, 1024, 128): (512, 0.508),
    (8, 1024, 256): (128, 0.000),
    (8, 4096, 16): (1024, 0.063),
    (8, 4096, 64): (64, 0.000),
    (8, 4096, 128): (64, 0.000),
    (8, 4096, 256): (128, 0.000),
    (8, 32768, 16): (64, 0.000),
    (8, 32768, 64): (64, 0.000),
    (8, 32768, 128): (64, 0.000),
    (8, 32768, 256): (128, 0.000),
    (64, 1024, 16): (512, 0.000),
    (64, 1024, 64): (512, 0.000),
    (64, 1024, 128): (512, 0.000),
    (64, 1024, 256): (1024, 0.000),
    (64, 4096, 16): (512, 0.000),
    (64, 4096, 64): (512, 0.000),
    (64, 4096, 128): (512, 0.000),
    (64, 4096, 256): (1024, 0.000),
    (64, 32768, 16): (512, 0.000),
    (64, 32768, 64): (512, 0.000),
    (64, 32768, 128): (512, 0.000),
    (64, 32768, 256): (1024, 0.000),
}

CASES = [Case(batch, keys, rows) for batch in BATCHES for keys in KEYS for rows in ROWS]
TABLE = Table(
    [
        ("B", "{batch}"),
        ("keys", "{keys:,}"),
        ("rows", "{rows}"),
        ("blocks / at least", "{blocks} / {wanted}"),
        ("memory / at most", "{memory:.3f} / 1.05"),
        ("partials written / at most", "{written:.2f} / {most:g}"),
        ("read", "{read:.2f}"),
        ("again from L2", "{again:.2f}"),
        ("blocks before", "{blocks_before}"),
        ("written before", "{written_before:.2f}"),
    ],
    "`masked_attention` at the sizes of SDAR-8B, of one call with a plan: blocks that read K and V; bytes from and to"
    " memory over K, V, queries and output once; partial results over K and V; what blocks with other rows of the same"
    " keys read again, over K and V. Of K and V of more than 128 MiB, a few blocks stand for all.",
)


def most_written(rows: int) -> float:
    return 0.6 if rows <= 64 else 1.25


def count(case: Case) -> Count:
    """Of a mask in which every row sees every key."""
    emulated = torch.ops.simsd_emulated
    limit = 10**9 if case.kv_bytes <= FULL else BLOCKS
    q = torch.empty(case.batch, GROUP * KV_HEADS, case.rows // GROUP, DIM, dtype=torch.bfloat16)
    k, v = (torch.empty(case.batch, KV_HEADS, case.keys, DIM, dtype=torch.bfloat16) for _ in range(2))
    clock = torch.zeros(case.batch, case.rows // GROUP, dtype=torch.int32)
    birth = torch.zeros(case.batch, case.keys, dtype=torch.int32)
    mask = clock, birth, torch.full_like(birth, INF)
    plan = dispatch.operator("attention_plan", "cuda")(*mask, GROUP, case.batch)
    emulated.take_notes()
    emulated.set_counting(limit)
    try:
        dispatch.operator("masked_attention", "cuda")(q, k, v, *mask, None, None, None, plan)
    finally:
        emulated.set_counting(0)
    launches = [list(map(int, line.split())) for line in emulated.take_notes().splitlines()]
    _, _, blocks, ran, busy, copied, first, _, written, _ = launches[0]
    scale = blocks / ran
    read = sum(loaded * of / done for _, _, of, done, _, _, _, loaded, _, _ in launches[1:])
    shares = case.rows > MOST_ROWS and ran < blocks
    moved = scale * first + 4 * plan.numel() + case.q_bytes  # queries are in `first`, the output is as large
    return Count(
        blocks=busy * blocks // ran,
        memory=None if shares else moved / (case.kv_bytes + 2 * case.q_bytes),
        written=scale * written / case.kv_bytes,
        read=read / case.kv_bytes,
        again=None if shares else scale * (copied - first) / case.kv_bytes,
    )


def tabulate(bench: Bench) -> None:
    for case, found in zip(CASES, cuda_resources.emulated("attention_counts"), strict=True):
        blocks_before, written_before = BEFORE[case.batch, case.keys, case.rows]
        before = {"blocks_before": blocks_before, "written_before": written_before}
        limits = {"wanted": case.blocks, "most": most_written(case.rows)}
        bench.row(TABLE, **dataclasses.asdict(case), **found, **limits, **before)


if __name__ == "__main__":
    if not dispatch.EMULATION:
        raise SystemExit("needs SIMSD_CUDA_EMULATION=$(python tests/emulation.py)")
    torch.ops.simsd_emulated.set_multiprocessors(MULTIPROCESSORS)
    print(json.dumps([dataclasses.asdict(count(case)) for case in CASES]))
