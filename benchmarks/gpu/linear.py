"""Products beside torch's (cuBLAS): thin_linear on the matrices of SDAR-8B and SDAR-1.7B, grouped_linear on those of
SDAR-30B-A3B's experts."""

from __future__ import annotations

import torch

import simsd_kernels

from ..contest import Bench, Contestant, Unavailable, contest, near

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
# (E, N, K): gate_proj and up_proj as one, down_proj; each token goes to CHOICES experts.
EXPERTS = {"SDAR-30B-A3B": {"gate_up_proj": (128, 1536, 2048), "down_proj": (128, 2048, 768)}}
CHOICES = 8
TOKENS = (1, 4, 16, 64, 256)
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
    experts = {"tiny": {"gate_up_proj": (16, 48, 64)}} if bench.tiny else EXPERTS
    for model, shapes in experts.items():
        for name, sizes in shapes.items():
            grouped(bench, f"{model} {name} {' x '.join(map(str, sizes))}", *sizes)
    bench.note("bytes: weight, input and output once; one bf16 weight per input set, together larger than the L2 cache")
    bench.note("experts: of the weights, those of experts that have tokens; a token's experts are drawn evenly")


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


def grouped(bench: Bench, title: str, experts: int, n: int, k: int) -> None:
    if bench.time_left() <= 0:
        bench.not_run += [f"{title}, {tokens} tokens" for tokens in TOKENS]
        return
    weight = bench.random(experts, n, k, scale=k**-0.5)
    for tokens in TOKENS:
        case = f"{title}, {tokens} tokens"
        bench.attempt(case, lambda case=case, tokens=tokens: compete_in_groups(bench, case, weight, tokens))


def compete_in_groups(bench: Bench, case: str, weight: torch.Tensor, tokens: int) -> None:
    experts, n, k = weight.shape
    x = bench.random(tokens * CHOICES, k)
    # Calls go through several draws of experts: a few experts' weights would stay in the L2 cache.
    chosen = [torch.stack([bench.permutation(experts)[:CHOICES] for _ in range(tokens)]) for _ in range(8)]
    offsets = [simsd_kernels.sort_by_expert(one, experts).offsets for one in chosen]
    bounds = offsets[0].tolist()
    groups = zip(x.split([b - a for a, b in zip(bounds[:-1], bounds[1:], strict=True)]), weight, strict=True)
    check = near(torch.cat([rows.float() @ own.float().T for rows, own in groups]), 1e-2)

    def by(backend: str) -> list:
        return [lambda o=o: simsd_kernels.grouped_linear(x, weight, o, backend=backend) for o in offsets]

    def torchs() -> list:
        if not hasattr(torch.nn.functional, "grouped_mm"):
            raise Unavailable("this torch has no grouped_mm")
        ends = [o[1:].contiguous() for o in offsets]
        return [lambda e=e: torch.nn.functional.grouped_mm(x, weight.transpose(1, 2), offs=e) for e in ends]

    ours = [Contestant(f"simsd {b}", lambda b=b: by(b), check) for b in bench.backends]
    read = sum(one.unique().numel() for one in chosen) / len(chosen)
    contest(
        *(bench, case, [*ours, Contestant("torch grouped_mm", torchs, check)]),
        bytes_moved=2.0 * (read * n * k + len(x) * (n + k)),
        flops=2.0 * len(x) * n * k,
        output_bytes=2 * len(x) * n,
        input_sets=len(offsets),
    )
