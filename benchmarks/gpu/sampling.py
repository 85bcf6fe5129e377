"""sample_logits on a vocabulary of 151,936 beside torch's softmax, argmax and multinomial, eager and compiled."""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

import simsd_kernels

from ..contest import Bench, Contestant, contest, equal

VOCABULARY = 151936
COMPARED = 4  # rows that are compared with the reference, spread over all
FIELDS = ("token", "prob", "log_odds", "entropy", "logsumexp", "draw_logprob")


@dataclasses.dataclass(frozen=True)
class Mode:
    name: str
    temperature: float
    top_k: int = 0
    top_p: float = 1.0
    target: str | None = None


MODES = (
    Mode("greedy", 0.0, target="unfiltered"),
    Mode("temperature 1", 1.0, target="unfiltered"),
    Mode("top-k 50", 1.0, top_k=50),
    Mode("top-p 0.95", 1.0, top_p=0.95),
)
COMPILED_ROWS = 64  # one shape: each compilation takes as long as many of the other cases


def run(bench: Bench) -> None:
    vocabulary = 500 if bench.tiny else VOCABULARY
    all_rows = (2,) if bench.tiny else (64, 4, 256, 16, 1, 128)
    for rows in all_rows:
        moved = 2.0 * rows * vocabulary
        logits = [bench.random(rows, vocabulary, scale=3.0) for _ in range(bench.sets(moved))]
        for mode in MODES:
            case = f"{mode.name}, {rows} rows"
            bench.attempt(case, lambda c=case, m=mode, x=logits, b=moved: compete(bench, c, m, x, b))
    for mode in MODES[:2]:
        rows = 2 if bench.tiny else COMPILED_ROWS
        case = f"{mode.name}, {rows} rows (compiled)"
        bench.attempt(case, lambda c=case, m=mode, n=rows: compiled(bench, c, m, n, vocabulary))
    bench.note(f"logits bf16 [rows, {vocabulary}]; bytes: every logit read once")
    bench.note("torch: token, its probability and the entropy only; it draws other tokens, so nothing is compared")


def arguments(logits: Tensor, mode: Mode) -> tuple[Tensor, ...]:
    rows, device = logits.shape[0], logits.device

    def each(value, dtype: torch.dtype) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=device)

    position = torch.arange(rows, dtype=torch.int32, device=device)
    settings = each(mode.temperature, torch.float32), each(mode.top_k, torch.int32), each(mode.top_p, torch.float32)
    return logits, *settings, each(7, torch.int64), position, each(0, torch.int64)


def contestants(bench: Bench, mode: Mode, logits: list[Tensor]) -> list[Contestant]:
    given = [arguments(x, mode) for x in logits]
    rows = logits[0].shape[0]
    chosen = torch.linspace(0, rows - 1, min(rows, COMPARED)).round().long()

    @functools.cache
    def expected() -> tuple[Tensor, ...]:
        few = [x[chosen.to(x.device)].cpu() for x in given[0]]
        return simsd_kernels.sample_logits(few[0].float(), *few[1:], backend="reference")  # exact: the inputs are bf16

    def check(out) -> str | None:
        return equal(FIELDS, expected())([x[chosen.to(x.device)].cpu() for x in out]) or unwritten(out)

    def make(backend: str) -> list:
        return [lambda g=g: simsd_kernels.sample_logits(*g, backend=backend) for g in given]

    return [Contestant(f"simsd {b}", lambda b=b: make(b), check) for b in bench.backends]


def unwritten(out) -> str | None:
    for name, value in zip(FIELDS[1:], out[1:], strict=True):
        if not bool(value.isfinite().all()):
            return f"{name} is not finite in {int((~value.isfinite()).sum())} of {len(value)} rows"
    return None


def by_torch(mode: Mode):
    """logits -> token, probability, entropy."""

    def statistics(x: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_p = x.log_softmax(1)
        return token, log_p.gather(1, token[:, None]).exp(), -(log_p.exp() * log_p).sum(1)

    def greedy(logits: Tensor):
        x = logits.float()
        return statistics(x, x.argmax(1))

    def drawn(logits: Tensor):
        x = logits.float() / mode.temperature
        kept = x
        if mode.top_k:
            least = x.topk(mode.top_k, 1).values[:, -1:]
            kept = x.masked_fill(x < least, -torch.inf)
        if mode.top_p < 1:
            ordered, order = x.sort(1, descending=True)
            p = ordered.softmax(1)
            cut = (p.cumsum(1) - p) >= mode.top_p
            kept = x.masked_fill(torch.zeros_like(cut).scatter(1, order, cut), -torch.inf)
        return statistics(x, torch.multinomial(kept.softmax(1), 1).squeeze(1))

    return greedy if mode.temperature == 0 else drawn


def compete(bench: Bench, case: str, mode: Mode, logits: list[Tensor], moved: float) -> None:
    eager = by_torch(mode)
    peer = Contestant("torch eager", lambda: [lambda x=x: eager(x) for x in logits])
    ours = contestants(bench, mode, logits)
    rows = logits[0].shape[0]
    contest(
        *(bench, case, [*ours, peer]),
        bytes_moved=moved,
        output_bytes=8 * rows,
        target=mode.target,
        input_sets=len(logits),
    )


def compiled(bench: Bench, case: str, mode: Mode, rows: int, vocabulary: int) -> None:
    moved = 2.0 * rows * vocabulary
    logits = [bench.random(rows, vocabulary, scale=3.0) for _ in range(bench.sets(moved))]

    def make() -> list:
        function = by_torch(mode)
        if not bench.tiny:
            torch._dynamo.reset()
            function = torch.compile(function, dynamic=False)
        return [lambda x=x: function(x) for x in logits]

    ours = contestants(bench, mode, logits)
    contest(bench, case, [*ours, Contestant("torch compiled", make)], bytes_moved=moved, input_sets=len(logits))
