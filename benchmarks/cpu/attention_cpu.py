"""masked_attention on the CPU against scaled_dot_product_attention with a dense mask, interleaved in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from simsd_kernels import Visibility
from simsd_kernels.visibility import clean_rows, concatenate

from ..contest import Bench
from ..report import Table, spread
from ..timing import Timing, measure

Q_HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 4  # SDAR-8B's heads


@dataclass(frozen=True)
class Case:
    """One shape. `target` is the ratio that the project asks for, None where it asks for none."""

    rows: int
    keys: int
    mask: str  # "verify": a new block's rows behind a fully visible prefix; "prefill": block-causal, half of it dead
    dtype: torch.dtype = torch.float32
    target: float | None = None

    def __str__(self) -> str:
        return f"{self.mask} {self.rows} rows x {self.keys} keys {str(self.dtype).removeprefix('torch.')}"


CASES = [
    Case(8, 1024, "verify", target=2.2),
    Case(8, 4096, "verify", target=2.2),
    Case(16, 1024, "verify", target=1.4),
    Case(16, 4096, "verify", target=1.4),
    Case(64, 1024, "verify", target=1.1),
    Case(64, 4096, "verify", target=1.1),
    Case(512, 512, "prefill", target=1.5),
    Case(8, 1024, "verify", torch.bfloat16),
    Case(8, 4096, "verify", torch.bfloat16),
    Case(64, 1024, "verify", torch.bfloat16),
    Case(512, 512, "prefill", torch.bfloat16),
]


def visibility(case: Case) -> Visibility:
    if case.mask == "prefill":
        return Visibility.block_causal(case.keys, BLOCK)
    prefix = clean_rows(torch.zeros(case.keys - case.rows, dtype=torch.int32), 1)
    block = clean_rows(torch.ones(case.rows, dtype=torch.int32), 1)
    _, birth, death = concatenate(prefix, block)
    return Visibility(block[0], birth, death)


def contestants(case: Case) -> dict[str, Callable[[], torch.Tensor]]:
    """The same attention by both, ready to call; raises if they disagree."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, Q_HEADS, case.rows, DIM, generator=generator).to(case.dtype)
    k, v = (torch.randn(1, KV_HEADS, case.keys, DIM, generator=generator).to(case.dtype) for _ in range(2))
    seen = visibility(case)
    vectors = seen.clock[None], seen.birth[None], seen.death[None]
    dense = seen.dense()[None, None]

    def simsd() -> torch.Tensor:
        return torch.ops.simsd.masked_attention(q, k, v, *vectors)

    def sdpa() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True)

    tolerance = 16 * torch.finfo(case.dtype).eps
    torch.testing.assert_close(simsd(), sdpa(), atol=tolerance, rtol=tolerance)
    return {"simsd": simsd, "sdpa": sdpa}


def flops(case: Case) -> float:
    """Of the visible part of the mask: two products, a multiplication and an addition each."""
    return 4.0 * Q_HEADS * DIM * float(visibility(case).dense().sum())


TABLE = Table(
    [
        ("case", "{case}"),
        ("simsd ms", spread("simsd_ms")),
        ("sdpa ms", spread("sdpa_ms")),
        ("simsd GFLOP/s", "{simsd_gflops:.0f}"),
        ("ratio", "{ratio:.2f}"),
        ("ratio of best", "{ratio_of_best:.2f}"),
        ("target", "{target:.1f}"),
    ]
)


def run(bench: Bench, seconds: float) -> None:
    """`seconds`: of measuring per case."""
    for case in CASES[:1] if bench.tiny else CASES:
        calls = {name: [call] for name, call in contestants(case).items()}
        found = measure(calls, bench.device, seconds, least=10)
        ours, theirs = found["simsd"], found["sdpa"]
        bench.row(
            TABLE,
            case=str(case),
            rounds=ours.samples,
            **{f"{name}_ms": milliseconds(taken) for name, taken in found.items()},
            simsd_gflops=flops(case) / ours.us / 1e3,
            ratio=theirs.us / ours.us,
            ratio_of_best=theirs.best_us / ours.best_us,
            target=case.target,
        )


def milliseconds(taken: Timing) -> dict[str, float]:
    parts = {"best": taken.best_us, "low": taken.low_us, "median": taken.us, "high": taken.high_us}
    return {name: us / 1e3 for name, us in parts.items()}
