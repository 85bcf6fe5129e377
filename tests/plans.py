"""Arguments of plan_block, made by hand or at random, and its copies in readable form."""

import functools
import math
import random

import torch
from hypothesis import strategies as st

import simsd_kernels
from simsd_kernels.plan_block.api import copy_stride

STRATEGIES = ("sequential", "low_confidence_static", "low_confidence_dynamic", "entropy_bounded")
MASK = 99
VOCABULARY = 20


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def arguments(batch=1, ahead=1, length=4, steps=None, number=0, **given):
    """Every argument by name, in the op's order: empty blocks at position 2 L, random statistics, ample budgets."""
    steps = length if steps is None else steps
    generator = torch.Generator().manual_seed(number)
    copies = given.get("max_copies", 100)
    prob = torch.rand(batch, ahead, length, generator=generator) ** 0.3
    lane = torch.ones(batch, dtype=torch.int32)
    scratch = given.get("scratch", -(-(ahead + 6) * length // 256) * 256)
    made = {
        "tokens": torch.randint(0, VOCABULARY, (batch, length), generator=generator),
        "revealed": torch.zeros(batch, dtype=torch.int64),
        "start": lane * 2 * length,
        "step": lane * 0,
        "blocks_left": lane * (ahead + 1),
        "clean": torch.randint(0, VOCABULARY, (batch, ahead, length), generator=generator),
        "depth": lane * ahead,
        "prob": prob,
        "log_odds": torch.logit(prob.double(), eps=1e-9).float(),
        "entropy": torch.rand(batch, ahead, length, generator=generator) * 2,
        "trust": torch.ones(batch),
        "power": torch.ones(batch, ahead),
        **dict.fromkeys(("draft_logits", "temperature", "top_k", "top_p", "seed", "banned_ids")),
        "schedule": torch.tensor([length // steps + (s < length % steps) for s in range(steps)], dtype=torch.int32),
        "strategy": "low_confidence_static",
        "threshold": 0.9,
        "floor": 0.0,
        "mask_id": MASK,
        "max_copies": copies,
        "max_rows": 10**6,
        "scratch": scratch,
        "slots": scratch + copies * copy_stride(length),
        "stride": copies + 3,
    }
    assert not given.keys() - made.keys()
    return made | given


def plan(made, backend=None):
    return simsd_kernels.plan_block(**made, backend=backend)


def copied(out, lane=0):
    """(block, set, tokens with None where masked) of each copy of a lane, in order."""
    length = out.states.shape[2]
    found = []
    for block, bits, tokens in zip(*(x[lane].tolist() for x in (out.block, out.revealed, out.states)), strict=True):
        if block >= 0:
            found.append((block, bits % 2**64, tuple(t if bits >> i & 1 else None for i, t in enumerate(tokens))))
        else:
            assert bits == 0 and tokens == [0] * length
    return found


def sizes(out, lane=0):
    return [bits.bit_count() for _, bits, _ in copied(out, lane)]


def random_case(number, logits=False):
    """Ragged batches with idle lanes, partly known blocks, ties, NaN, odd schedules and tight budgets."""
    chance = random.Random(number)
    pick = chance.choice
    batch, ahead = pick([0, 1, 2, 2, 3, 3]), pick([0, 1, 1, 2, 2, 2, 3, 3])
    length = pick([*range(1, 10), 4, 4, 64])
    made = arguments(
        *(batch, ahead, length, pick([length, (length + 1) // 2, chance.randint(1, length)]), number),
        strategy=pick(STRATEGIES),
        threshold=pick([0.0, 0.5, 0.7, 0.9, 1.0, 3.0, math.inf]),
        floor=pick([0.0, 0.0, 1e-3, 0.05]),
        max_copies=pick([1, 5, 16, 16, 40, 40]),
        max_rows=pick([0, 7 * length, 20 * length, *[10**6] * 9]),
    )

    def lanes(values, dtype):
        return torch.tensor([pick(values) for _ in range(batch)], dtype=dtype)

    made["start"] = lanes([-1, 0, *[length, 3 * length] * 3], torch.int32)
    made["step"] = lanes([*[0] * 9, 1, 2], torch.int32)
    made["blocks_left"] = lanes([0, 1, 2, 3, 4, 4], torch.int32)
    made["depth"] = lanes([*[ahead] * 5, ahead // 2], torch.int32)
    made["power"] = torch.tensor([pick([0.0, 0.5, 1.0, 2.0]) for _ in range(batch * ahead)]).view(batch, ahead)
    made["trust"] = lanes([0.0, 0.7, 0.9, *[1.0] * 9], torch.float32)
    made["revealed"] = lanes([*[0] * 8, 1, 2, 5, -(2**63), -1], torch.int64)
    if chance.random() < 0.2:
        made["schedule"] = ints(*(chance.randint(0, 3) for _ in range(chance.randint(0, 4))))
    match pick(["as drawn", "as drawn", "ties", "poison"]):
        case "ties":
            for name in ("prob", "log_odds", "entropy"):
                made[name] = (made[name] * 4).round() / 4
        case "poison":
            made["prob"].view(-1)[2::5] = math.nan
            made["log_odds"].view(-1)[::4] = math.inf
            made["log_odds"].view(-1)[3::4] = math.nan
            made["entropy"].view(-1)[1::4] = math.nan
    if logits:
        generator = torch.Generator().manual_seed(number)
        made["draft_logits"] = torch.randn(batch, ahead, length, VOCABULARY, generator=generator) * 4
        made["clean"] = made["draft_logits"].argmax(dim=3)
        made["temperature"] = lanes([0.0, 0.3, 0.8], torch.float32)
        made["seed"] = lanes(range(-9, 9), torch.int64)
        if chance.random() < 0.5:
            made["top_k"], made["top_p"] = lanes([0, 5], torch.int32), lanes([1.0, 0.9], torch.float32)
            made["banned_ids"] = torch.tensor([3])
    return made


def cases(logits=False):
    return st.integers(0, 2**32 - 1).map(functools.partial(random_case, logits=logits))
