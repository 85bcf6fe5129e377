"""What `thin_linear` on CUDA does for the products of SDAR-8B, as JSON:

    SIMSD_CUDA_EMULATION=$(python tests/emulation.py) python -m benchmarks.cpu.linear_counts

The emulation makes the launches of an H100 and counts their blocks; it runs one block of each, whose copies and
products it counts, and all do the same, since the sizes are whole tiles. Neither a GPU nor time is needed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import torch

from simsd_kernels import dispatch, thin_linear

from ..report import Table

MULTIPROCESSORS = 132  # of an H100
PRODUCTS = {"QKV": (6144, 4096), "output": (4096, 4096), "gate and up": (24576, 4096), "down": (4096, 12288)}  # N, K
ROWS = (16, 64, 256, 2048)
# A tile that cuBLAS has for large products, and the one by which it can be compared (NVIDIA, Matrix Multiplication
# Background User's Guide, DU-09799, 2.3); what it chooses for one of these, only a profiler tells.
BLAS_TILE = 128

# Blocks and copied MB of PRODUCTS by ROWS as of commit 7cdc1e3, counted the same way.
BEFORE = {
    "QKV": ((192, 75), (192, 151), (768, 604), (6144, 4832)),
    "output": ((128, 50), (128, 101), (512, 403), (4096, 3221)),
    "gate and up": ((768, 302), (768, 604), (3072, 2416), (24576, 19327)),
    "down": ((128, 151), (128, 302), (512, 1208), (4096, 9664)),
}
TABLE = Table(
    [
        *(("product", "{product}"), ("rows", "{rows}"), ("MB at least", "{least_mb:.0f}")),
        *(("blocks", "{blocks}"), ("MB copied", "{copied_mb:.0f}"), ("HMMA per KB copied", "{products_per_kb:.1f}")),
        *(("blocks of 128 x 128", "{blas_blocks}"), ("MB they copy", "{blas_mb:.0f}")),
        *(("blocks before", "{blocks_before}"), ("MB before", "{copied_mb_before}")),
    ],
    "Products of SDAR-8B in bf16 by `thin_linear`, as an H100 is given them",
)


@dataclasses.dataclass(frozen=True)
class Count:
    """
    Attributes:
        least_mb: weight, x and output, once each: what HBM gives and takes.
        copied_mb: what all blocks copy of the weight and x, from L2 or through it.
        products: m16n8k16 products on tensor cores; products_per_kb: of what is copied.
        blas_blocks, blas_mb: blocks of BLAS_TILE columns and up to as many rows, and what they copy.
    """

    product: str
    rows: int
    blocks: int
    least_mb: float
    copied_mb: float
    products: int
    products_per_kb: float
    blas_blocks: int
    blas_mb: float
    blocks_before: int
    copied_mb_before: int


def count() -> Iterator[Count]:
    """Needs SIMSD_CUDA_EMULATION."""
    emulated = torch.ops.simsd_emulated
    emulated.set_multiprocessors(MULTIPROCESSORS)
    emulated.set_counting(1)
    try:
        for product, (n, k) in PRODUCTS.items():
            weight = torch.empty(n, k, dtype=torch.bfloat16)  # never written, so most of it never exists
            for rows, (blocks_before, copied_mb_before) in zip(ROWS, BEFORE[product], strict=True):
                thin_linear(torch.empty(rows, k, dtype=torch.bfloat16), weight, backend="cuda")
                _, _, blocks, _, _, copied, _, _, _, products = map(int, emulated.take_notes().split())
                copied, products = blocks * copied, blocks * products
                down, across = -(-rows // BLAS_TILE), n // BLAS_TILE
                yield Count(
                    product=product,
                    rows=rows,
                    blocks=blocks,
                    least_mb=2 * (n * k + rows * k + rows * n) / 1e6,
                    copied_mb=copied / 1e6,
                    products=products,
                    products_per_kb=products / (copied / 1024),
                    blas_blocks=down * across,
                    blas_mb=2 * k * (down * n + across * rows) / 1e6,
                    blocks_before=blocks_before,
                    copied_mb_before=copied_mb_before,
                )
    finally:
        emulated.set_counting(0)
        emulated.set_multiprocessors(4)


if __name__ == "__main__":
    if not dispatch.EMULATION:
        raise SystemExit("needs SIMSD_CUDA_EMULATION=$(python tests/emulation.py)")
    print(json.dumps([dataclasses.asdict(found) for found in count()], indent=1))
