"""The small ops of a decoding step beside their definitions in torch, which walk over lists on the host."""

from __future__ import annotations

import torch
from torch import Tensor

import simsd_kernels
from simsd.decode.rows import STRIDE
from simsd_kernels import dispatch
from simsd_kernels.plan_block.api import Plan, copy_stride
from simsd_kernels.reveal.api import STRATEGIES

from .. import timing
from ..contest import Bench, Contestant, contest, equal

VOCABULARY = 151936
MASK_ID = 151669
BEHIND = 8.0  # log-odds between a position and the one that is revealed before it


def run(bench: Bench) -> None:
    vocabulary = 300 if bench.tiny else VOCABULARY
    shapes = [(1, 4)] if bench.tiny else [(1, 4), (8, 4), (1, 8)]
    for batch, length in shapes:  # plan and walk first: they are of every step of decoding
        what = f"batch {batch}, block {length}"
        small(bench, f"plan_block, {what}", lambda b=batch, n=length: plan(bench, b, n))
        small(bench, f"verify_graph, {what}", lambda b=batch, n=length: walk(bench, b, n, vocabulary))
    for batch, length in shapes:
        what = f"batch {batch}, block {length}"
        small(bench, f"reveal, {what}", lambda b=batch, n=length: reveal(bench, b, n))
        for rule, temperature in (("match", 0.0), ("match", 1.0), ("mrs", 1.0)):
            name = f"block_verify {rule}, temperature {temperature:g}, {what}"
            small(bench, name, lambda b=batch, n=length, r=rule, t=temperature: verify(bench, b, n, vocabulary, r, t))
    bench.note(
        "wall: until the host knows the result of one call, launches included; the loop waits for that once a step"
    )


def small(bench: Bench, case: str, problem) -> None:
    """`problem()`: (function of a backend returning calls, names of outputs, outputs to expect, bytes)."""
    bench.attempt(case, lambda: compete(bench, case, problem))


def compete(bench: Bench, case: str, problem) -> None:
    make, names, expected, moved = problem()
    check = equal(names, expected)
    op = case.split(",")[0].split()[0]
    backends = [backend for backend in bench.backends if backend != "triton" or dispatch.has_triton(op)]
    ours = [Contestant(f"simsd {b}", lambda b=b: make(b), check) for b in backends]
    row = contest(
        *(bench, case, [*ours, Contestant("reference", lambda: make("reference"), check, graph=False)]),
        bytes_moved=moved,
    )
    for name, figures in row["contestants"].items():
        if "us" in figures:
            backend = name.removeprefix("simsd ")
            repeats = 1 if figures["us"] > timing.SLOW_US else 5
            figures["wall_us"] = timing.wall_us(make(backend)[0], bench.device, repeats)
    bench.add(row)


def lanes(bench: Bench, batch: int, value, dtype: torch.dtype) -> Tensor:
    return torch.full((batch,), value, dtype=dtype, device=bench.device)


def on_cpu(given: dict) -> dict:
    return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in given.items()}


def rules(bench: Bench, batch: int, length: int) -> dict:
    """A position a step, the surest first."""
    return {
        "schedule": torch.ones(batch, length, dtype=torch.int32, device=bench.device),
        "steps": lanes(bench, batch, length, torch.int32),
        "strategy": lanes(bench, batch, STRATEGIES.index("low_confidence_static"), torch.int32),
        "threshold": lanes(bench, batch, 0.9, torch.float32),
    }


def reveal(bench: Bench, batch: int, length: int):
    shape, device = (batch, length), bench.device
    given = {
        "tokens": torch.full(shape, MASK_ID, device=device),
        "revealed": lanes(bench, batch, 1, torch.int64),
        "step_map": torch.zeros(shape, dtype=torch.int32, device=device),
        "proposal": (1000 * bench.uniform(*shape)).long(),
        "prob": bench.uniform(*shape),
        "log_odds": bench.random(*shape, dtype=torch.float32),
        "entropy": bench.uniform(*shape),
        "step": lanes(bench, batch, 0, torch.int32),
        **rules(bench, batch, length),
    }
    changed = ("tokens", "revealed", "step_map")

    def call(given: dict, backend: str) -> tuple[Tensor, ...]:
        fresh = {**given, **{name: given[name].clone() for name in changed}}  # in place, so each call has its own
        newly = simsd_kernels.reveal(**fresh, backend=backend)
        return newly, *(fresh[name] for name in changed)

    expected = call(on_cpu(given), "reference")
    bench.note("reveal: with three copies of its in-place arguments, for every contestant")
    return lambda backend: [lambda: call(given, backend)], ("newly", *changed), expected, None


def verify(bench: Bench, batch: int, length: int, vocabulary: int, rule: str, temperature: float):
    shape, device = (batch, length), bench.device
    logits = bench.random(batch, length, vocabulary, scale=3.0)
    given = {
        "target_logits": logits,
        "draft_ids": logits.float().argmax(2),
        "known": lanes(bench, batch, 0, torch.int32),
        "drafted": lanes(bench, batch, (1 << length) - 1, torch.int64),
        "temperature": lanes(bench, batch, temperature, torch.float32),
        "rule": rule,
    }
    if rule == "mrs":
        draft = {"draft_logits": (logits + bench.random(*logits.shape, scale=0.1)).contiguous()}
        given |= draft | {"coin": bench.uniform(*shape) * 0.99, "residual": bench.uniform(batch) * 0.99}
    elif temperature:
        position = torch.arange(length, dtype=torch.int32, device=device).expand(shape).contiguous()
        given |= {"seed": lanes(bench, batch, 3, torch.int64), "position": position}
        given["revealed"] = torch.zeros(shape, dtype=torch.int64, device=device)
    expected = simsd_kernels.block_verify(**on_cpu(given), backend="reference")

    def make(backend: str) -> list:
        return [lambda: simsd_kernels.block_verify(**given, backend=backend)]

    moved = 2.0 * logits.numel() * (2 if rule == "mrs" else 1)
    return make, expected._fields, expected, moved


def proposal(batch: int, length: int, states: int) -> dict:
    """plan_block's arguments on the CPU: two empty blocks whose draft knows the order and is fairly sure of itself."""
    generator = torch.Generator().manual_seed(0)
    ahead, slot = 2, torch.ones(batch, dtype=torch.int32)
    shape = (batch, ahead, length)
    scratch = 1024
    order = torch.rand(shape, generator=generator).argsort(2).float()
    start = 8 * length
    return {
        "text": torch.randint(0, 250, (batch, start + (ahead + 2) * length), generator=generator),
        "revealed": torch.zeros(batch, dtype=torch.int64),
        "start": slot * start,
        "end": slot * (start + (ahead + 1) * length),
        "step": slot * 0,
        "kv_len": slot * (start - length),
        "draft_tokens": torch.randint(0, 250, shape, generator=generator),
        "proposal_depth": slot * ahead,
        "draft_end": slot * 2**30,
        "prob": torch.full(shape, 0.9),
        "log_odds": BEHIND * order,
        "entropy": torch.full(shape, 0.3),
        "draft_calibration": torch.ones(batch),
        "order_sharpness": torch.full((batch, ahead), 0.25),
        "min_visit_prob": torch.zeros(batch),
        "row_budget": torch.tensor([10**6], dtype=torch.int32),
        "schedule": torch.ones(batch, length, dtype=torch.int32),
        "steps": slot * length,
        "strategy": slot * STRATEGIES.index("low_confidence_static"),
        "threshold": torch.full((batch,), 0.9),
        "mask_id": MASK_ID,
        "pending": 1,
        "max_states": states,
        "logits_rows": batch * states * length,
        "scratch": scratch,
        "kv_slots": scratch + states * copy_stride(length),
        "stride": STRIDE,
    }


def moved_to(device: torch.device, given: dict) -> dict:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in given.items()}


def states_of(length: int) -> int:
    return 1 + 128 // length


def plan(bench: Bench, batch: int, length: int):
    host = proposal(batch, length, states_of(length))
    expected = simsd_kernels.plan_block(**host, backend="reference")
    given = moved_to(bench.device, host)

    def make(backend: str) -> list:
        return [lambda: simsd_kernels.plan_block(**given, backend=backend)]

    return make, Plan._fields, expected, None


def walk(bench: Bench, batch: int, length: int, vocabulary: int):
    """A target that agrees with the draft in everything: the walk goes over two blocks to the empty one behind them."""
    generator, blocks, states = torch.Generator().manual_seed(0), 2, states_of(length)
    rank = torch.rand(batch, blocks, length, generator=generator).argsort(2)  # a block's positions as they are revealed
    draft = torch.randint(0, 250, (batch, blocks, length), generator=generator)
    # The draft's own way, the empty block behind it, and then any states.
    number = torch.arange(states)
    block = torch.where(number <= blocks * length, number // length, number % blocks)
    of_state = block.clamp(max=blocks - 1)
    masked = rank[:, of_state] >= (number % length)[:, None]
    masked |= (block == blocks)[:, None]
    anything = torch.rand(masked.shape, generator=generator) < 0.5
    masked = torch.where((number > blocks * length)[:, None], anything, masked)
    rows = torch.where(masked, masked.flatten().cumsum(0).view(masked.shape) - 1, -1).int()
    logits = bench.random(int(masked.sum()), vocabulary)
    token, odds = draft[:, of_state][masked], 40.0 + BEHIND * (length - rank[:, of_state][masked])
    logits[torch.arange(len(token)), token.to(bench.device)] = odds.to(logits)
    host = {
        "rows": rows,
        "states": torch.where(masked, 0, draft[:, of_state]),
        "state_revealed": (~masked << torch.arange(length)).sum(2),
        "block": block.int().expand(batch, states),
        "draft_tokens": draft,
        "step_map": torch.zeros(batch, length, dtype=torch.int32),
        "prob": torch.ones(batch, length),
        "draw_logprob": torch.zeros(batch, length),
        "origin": torch.zeros(batch, length, dtype=torch.int32),
    }
    given = {
        "target_logits": logits,
        **moved_to(bench.device, host),
        "draft_blocks_in_rows": lanes(bench, batch, blocks, torch.int32),
        "proposal_depth": lanes(bench, batch, blocks, torch.int32),
        "start": lanes(bench, batch, 8 * length, torch.int32),
        "step": lanes(bench, batch, 0, torch.int32),
        "temperature": lanes(bench, batch, 0.0, torch.float32),
        **rules(bench, batch, length),
    }
    # By the definition on the device: on the CPU it takes seconds over such a vocabulary.
    expected = simsd_kernels.verify_graph(**given, backend="reference")

    def make(backend: str) -> list:
        return [lambda: simsd_kernels.verify_graph(**given, backend=backend)]

    taken = int(expected.progress[:, 2].sum())
    bench.note(f"verify_graph, batch {batch}, block {length}: {taken} steps walked, {states} states of a slot")
    return make, expected._fields, expected, 2.0 * logits.numel()
