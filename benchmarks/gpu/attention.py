"""masked_attention beside torch's and others' attention: few rows of a verification, many rows of a prefill, pages."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from simsd_kernels import INF, masked_attention

from ..contest import Bench, Contestant, accepts, contest, near
from . import attention_peers as peers

Q_HEADS, KV_HEADS, DIM, BLOCK = 32, 8, 128, 4  # SDAR-8B's
TOLERANCE, ROW_TOLERANCE = 1e-2, 5e-2  # bf16 operands


@dataclasses.dataclass(frozen=True)
class Case:
    """`mask` "verify": copies of a block behind a prefix that all of them see; "causal"; "block-causal"."""

    mask: str
    rows: int
    keys: int
    batch: int = 1
    page: int | None = None
    target: str | None = None
    flex: bool = False

    def __str__(self) -> str:
        kind = {"verify": "few rows", "causal": "causal prefill", "block-causal": "block-causal prefill"}[self.mask]
        size = f"{self.rows}" if self.mask != "verify" else f"{self.rows} x {self.keys} keys"
        more = f", pages of {self.page}" if self.page else ""
        return f"{kind} {size}, batch {self.batch}{more}{' (FlexAttention)' if self.flex else ''}"


def cases(tiny: bool) -> list[Case]:
    """In the order of what must not be missed when time is short."""
    if tiny:
        few = [Case("verify", 8, 32, 2, target="few rows"), Case("verify", 8, 32, 1, flex=True)]
        return [
            *few,
            Case("causal", 16, 16, target="many rows"),
            Case("block-causal", 16, 16),
            Case("verify", 4, 32, 2, 16),
        ]
    asked = [
        Case("verify", rows, keys, batch, target="few rows")
        for keys in (4096, 32768, 8192)
        for batch in (1, 8)
        for rows in (16, 64, 256)
    ]
    prefill = [Case("causal", n, n, target="many rows") for n in (2048, 8192, 512, 1024, 4096)]
    blocks = [Case("block-causal", n, n) for n in (2048, 8192)]
    pages = [Case("verify", 64, keys, 8, page) for keys in (4096, 32768) for page in (16, 64, 256)]
    flex = [Case("verify", 64, 4096, flex=True)]  # one: each shape is compiled anew, for as long as many cases take
    short = [Case("verify", rows, keys, batch) for keys in (512, 1024) for batch in (1, 8) for rows in (16, 64, 256)]
    return [*asked, *prefill[:2], *flex, *pages, *blocks, *prefill[2:], *short]


def run(bench: Bench) -> None:
    if not accepts(masked_attention, "block_table"):
        bench.note("pages: not measured, masked_attention has no block_table in this version")
    for case in cases(bench.tiny):
        if case.page and not accepts(masked_attention, "block_table"):
            continue
        bench.attempt(str(case), lambda case=case: compete(bench, case))


def intervals(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """clock int32 [B, R], birth and death int32 [B, K]."""

    def spread(x: Tensor) -> Tensor:
        return x.to(torch.int32).expand(case.batch, -1).contiguous()

    if case.mask != "verify":
        moment = torch.arange(case.keys, device=device)
        moment = moment if case.mask == "causal" else moment // BLOCK
        return spread(moment), spread(moment), spread(torch.full_like(moment, INF))
    copy = 1 + torch.arange(case.rows, device=device) // BLOCK
    prefix = torch.zeros(case.keys - case.rows, dtype=copy.dtype, device=device)
    return spread(copy), spread(torch.cat((prefix, copy))), spread(torch.cat((prefix + INF, copy)))


@dataclasses.dataclass
class Problem:
    """Input sets of one case, on the device: q, k, v per set, one mask for all."""

    case: Case
    sets: list[tuple[Tensor, Tensor, Tensor]]
    clock: Tensor
    birth: Tensor
    death: Tensor
    tiny: bool

    def dense(self) -> Tensor:
        """bool [B, 1, R, K]: built on the device, as the kernels of the published code are given it."""
        moment = self.clock[:, None, :, None]
        return (self.birth[:, None, None] <= moment) & (moment <= self.death[:, None, None])

    def visible(self) -> int:
        return int(self.dense().sum())

    def exact(self) -> Tensor:
        """The first set's output in float32, one KV head of one sequence at a time, without reduced precision."""
        q, k, v = self.sets[0]
        mask, out = self.dense(), torch.empty_like(q, dtype=torch.float32)
        group = q.shape[1] // k.shape[1]
        for b in range(q.shape[0]):
            for h in range(k.shape[1]):
                heads = slice(h * group, (h + 1) * group)
                score = q[b, heads].float() @ k[b, h].float().T * DIM**-0.5
                out[b, heads] = score.masked_fill_(~mask[b, 0], -torch.inf).softmax(-1) @ v[b, h].float()
        return out


def bytes_of(case: Case) -> float:
    """Keys and values once, queries and output once, the mask's vectors once."""
    kv = 2 * case.batch * KV_HEADS * case.keys * DIM * 2
    rows = 2 * case.batch * Q_HEADS * case.rows * DIM * 2
    return kv + rows + 4 * case.batch * (case.rows + 2 * case.keys)


def compete(bench: Bench, case: Case) -> None:
    moved = bytes_of(case)
    sets = [
        (
            bench.random(case.batch, Q_HEADS, case.rows, DIM),
            *(bench.random(case.batch, KV_HEADS, case.keys, DIM) for _ in range(2)),
        )
        for _ in range(bench.sets(moved))
    ]
    problem = Problem(case, sets, *intervals(case, bench.device), bench.tiny)
    check = near(problem.exact(), TOLERANCE, ROW_TOLERANCE)
    if case.page:
        contestants = paged(bench, problem, check)
    else:
        contestants = [Contestant(f"simsd {b}", lambda b=b: ours(problem, b), check) for b in bench.backends]
    contestants += peers.of(problem, check)
    contest(
        *(bench, str(case), contestants),
        bytes_moved=moved,
        flops=4.0 * Q_HEADS * DIM * problem.visible(),
        output_bytes=2 * case.batch * Q_HEADS * case.rows * DIM,
        target=case.target,
        input_sets=len(sets),
    )
    bench.note(
        "bytes: K and V once + Q and output once + 4 B x (rows + 2 keys); flops: 4 x heads x 128 x visible pairs"
    )


def ours(problem: Problem, backend: str) -> list:
    seen = problem.clock, problem.birth, problem.death
    return [lambda qkv=qkv: masked_attention(*qkv, *seen, backend=backend) for qkv in problem.sets]


def paged(bench: Bench, problem: Problem, check) -> list[Contestant]:
    """The same keys in pages [P, Hkv, page, D] that lie in random order."""
    case, page = problem.case, problem.case.page
    count = case.keys // page
    order = bench.permutation(case.batch * count)
    table = torch.empty_like(order)
    table[order] = torch.arange(len(order), device=bench.device)
    table = table.view(case.batch, count).int()

    def pages(x: Tensor) -> Tensor:
        split = x.unflatten(2, (count, page)).transpose(1, 2).flatten(0, 1)  # [B * count, Hkv, page, D]
        return split[order].contiguous()

    pools = [(q, pages(k), pages(v)) for q, k, v in problem.sets]
    seen = problem.clock, problem.birth, problem.death

    def by(backend: str) -> list:
        return [lambda p=p: masked_attention(*p, *seen, block_table=table, backend=backend) for p in pools]

    def gathered() -> list:
        def whole(pool: Tensor) -> Tensor:
            return pool[table.long()].transpose(1, 2).flatten(2, 3)  # [B, Hkv, K, D]

        mask = problem.dense()
        return [lambda p=p: peers.sdpa(p[0], whole(p[1]), whole(p[2]), mask) for p in pools]

    return [
        *(Contestant(f"simsd {backend}", lambda backend=backend: by(backend), check) for backend in bench.backends),
        Contestant("pages gathered, then sdpa", gathered, check),
        Contestant("flashinfer, custom mask", lambda: peers.flashinfer_paged(problem, pools, table), check),
    ]
