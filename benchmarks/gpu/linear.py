"""thin_linear beside torch's linear (cuBLAS) on the matrices of SDAR-8B and SDAR-1.7B."""

from __future__ import annotations

import torch

import simsd_kernels

from .contest import Bench, Contestant, contest, near

# (N, K) of the distinct matrices: q_proj (o_proj alike), k_proj (v_proj), gate_proj (up_proj), down_proj, lm_head.
MATRICES = {
    "SDAR-8B": {
        "q_proj": (4096, 4096),
        "gate_proj": (12288, 4096),
        "down_proj": (4096, 12288),
        "k_proj": (1024, 4096),
        "lm_head": (151936, 4096),
    },
    "SDAR-1.7B": {
        "q_proj": (2048, 2048),
        "gate_proj": (6144, 2048),
        "down_proj": (2048, 6144),
        "k_proj": (1024, 2048),
        "lm_head": (151936, 2048),
    },
}
ROWS = (1, 4, 8, 16, 32, 64)
THIN = 16  # rows up to which thin_linear is asked to be no slower


def run(bench: Bench) -> None:
    matrices = {"tiny": {"q_proj": (48, 64)}} if bench.tiny else MATRICES
    for model, shapes in matrices.items():
        for name, (n, k) in shapes.items():
            title = f"{model} {name} {n} x {k}"
            if bench.time_left() > 0:
                matrix(bench, title, n, k)
            else:
                bench.not_run += [f"{title}, {rows} rows" for rows in ROWS]
    bench.note("bytes: weight, input and output once; one bf16 weight per input set, together larger than the L2 cache")


def matrix(bench: Bench, title: str, n: int, k: int) -> None:
    count = bench.sets(2 * n * k)
    weights = [bench.random(n, k, scale=k**-0.5) for _ in range(count)]
    for rows in ROWS:
        bench.attempt(f"{title}, {rows} rows", lambda rows=rows: compete(bench, f"{title}, {rows} rows", weights, rows))


def compete(bench: Bench, case: str, weights: list[torch.Tensor], rows: int) -> None:
    n, k = weights[0].shape
    sets = [(bench.random(rows, k), weight) for weight in weights]
    x, weight = sets[0]
    # In float32 without reduced precision, a slice of the weight at a time: a vocabulary's is large.
    expected = torch.cat([x.float() @ part.float().T for part in weight.split(16384)], dim=1)
    check = near(expected, 1e-2)

    def by(backend: str) -> list:
        return [lambda s=s: simsd_kernels.thin_linear(*s, backend=backend) for s in sets]

    def cublas() -> list:
        return [lambda s=s: torch.nn.functional.linear(*s) for s in sets]

    ours = [Contestant(f"simsd {b}", lambda b=b: by(b), check) for b in bench.backends]
    contest(
        *(bench, case, [*ours, Contestant("cublas", cublas, check)]),
        bytes_moved=2.0 * (n * k + rows * (n + k)),
        flops=2.0 * rows * n * k,
        output_bytes=2 * rows * n,
        target="thin" if rows <= THIN else None,
        input_sets=len(sets),
    )
