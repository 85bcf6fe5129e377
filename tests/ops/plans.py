"""Arguments of plan_block, made by hand or at random, and its states in readable form."""

import functools
import math
import random

import torch
from hypothesis import strategies as st

from backends import callable_of
from rules import STRATEGIES, even, rule
from simsd_kernels import banned_mask
from simsd_kernels.plan_block.api import copy_stride

plan_block = callable_of("plan_block")

MASK = 99
VOCABULARY = 20
NEVER = 2**30  # draft_end of a draft that did not end the text
SHARED = ("row_budget", "banned", "seen_logits")  # by all slots
SEEN = (
    *("seen_block", "seen_exact"),
    *("seen_revealed", "seen_tokens", "seen_prob", "seen_log_odds", "seen_entropy", "seen_sharpness"),
    *("seen_rows", "seen_logits", "order_shift", "order_pair"),
)
PER_SLOT_RESULTS = (
    *("tokens", "positions", "slots", "clock", "birth", "death"),
    *("states", "state_revealed", "block", "draft_blocks_in_rows"),
)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def arguments(batch=1, ahead=1, length=4, number=0, rules=None, blocks_left=None, **given):
    """Every argument by name, in the op's order: empty blocks at position 2 L with the block before pending, random
    statistics, ample budgets.

    `rules`: of each slot, as `rule` takes it. `blocks_left`: how many blocks the walk may enter.
    """
    generator = torch.Generator().manual_seed(number)
    states = given.get("max_states", 100)
    slots = torch.ones(batch, dtype=torch.int32)
    scratch = given.get("scratch", -(-(ahead + 6) * length // 256) * 256)
    start = given.get("start", slots * 2 * length)
    prob = torch.rand(batch, ahead, length, generator=generator) ** 0.3
    made = {
        "text": torch.randint(0, VOCABULARY, (batch, (ahead + 6) * length), generator=generator),
        "revealed": torch.zeros(batch, dtype=torch.int64),
        "start": start,
        "end": start + (slots * (ahead + 1) if blocks_left is None else blocks_left) * length,
        "step": slots * 0,
        "kv_len": (start - length).clamp(min=0),
        "draft_tokens": torch.randint(0, VOCABULARY, (batch, ahead, length), generator=generator),
        "proposal_depth": slots * ahead,
        "draft_end": slots * NEVER,
        "prob": prob,
        "log_odds": torch.logit(prob.double(), eps=1e-9).float(),
        "entropy": torch.rand(batch, ahead, length, generator=generator) * 2,
        "draft_calibration": torch.ones(batch),
        "order_sharpness": torch.ones(batch, ahead),
        "min_visit_prob": torch.zeros(batch),
        "row_budget": ints(10**6),
        **rule(length, *(rules or [(even(length, length), "low_confidence_static", 0.9)] * batch)),
        **dict.fromkeys(("draft_logits", "temperature", "top_k", "top_p", "seed", "banned")),
        "peeks": None,
        **dict.fromkeys(SEEN),
        "mask_id": MASK,
        "pending": 1,
        "max_states": states,
        "logits_rows": batch * states * length,
        "scratch": scratch,
        "kv_slots": scratch + states * copy_stride(length),
        "stride": states + 3,
    }
    assert not given.keys() - made.keys()
    return made | given


def plan(made, backend=None):
    return plan_block(**made, backend=backend)


def assert_same(out, expected):
    for name, value in expected._asdict().items():
        assert getattr(out, name).dtype == value.dtype and torch.equal(getattr(out, name), value), name


def alone(made, b):
    """Slot b's arguments."""
    return {
        name: value[b : b + 1] if torch.is_tensor(value) and name not in SHARED else value
        for name, value in made.items()
    }


def strided(made):
    """The same, as columns of buffers twice as large, and rows of others that go on behind them."""
    return {
        name: torch.stack((value, value), dim=-1)[..., 0] if torch.is_tensor(value) else value
        for name, value in made.items()
    }


def graph(out, slot=0):
    """(block, set, tokens with None where masked) of each state of a slot, in order."""
    length = out.states.shape[2]
    found = []
    for block, bits, tokens in zip(
        *(x[slot].tolist() for x in (out.block, out.state_revealed, out.states)), strict=True
    ):
        if block >= 0:
            found.append((block, bits % 2**64, tuple(t if bits >> i & 1 else None for i, t in enumerate(tokens))))
        else:
            assert bits == 0 and tokens == [0] * length
    return found


def sizes(out, slot=0):
    return [bits.bit_count() for _, bits, _ in graph(out, slot)]


def with_seen(made, number, count=6, head=True):
    """The same where the target has seen `count` states of each slot, most of the current block, some of the next one:
    what is known, and more of what is drafted or of something else."""
    generator = torch.Generator().manual_seed(number)
    batch, ahead, length = made["draft_tokens"].shape
    shape = batch, count, length

    def uniform(*more):
        return torch.rand(*shape, *more, generator=generator)

    index = made["start"].clamp(min=0).long()[:, None] + torch.arange(length)
    known = (made["revealed"][:, None] >> torch.arange(length)) & 1 == 1  # [B, L]
    current = torch.where(known, made["text"].gather(1, index), 0)[:, None]
    block = (torch.rand(batch, count, generator=generator) < 0.3).int()
    is_next = block[..., None] == 1
    known = known[:, None] & ~is_next
    first, second = (made["draft_tokens"][:, min(k, ahead - 1), None] if ahead else current for k in (0, 1))
    drafted = torch.where(is_next, second, first)
    drawn = torch.where(uniform() < 0.8, drafted, torch.randint(0, VOCABULARY, shape, generator=generator))
    revealed = known | (uniform() < torch.rand(batch, count, 1, generator=generator) ** 2)
    revealed |= (uniform() < 0.05).all(2, keepdim=True)
    prob = uniform() ** 0.3
    rows = logits = None
    if made["draft_logits"] is not None:
        number = batch * count * length
        logits = torch.randn(number + 1, VOCABULARY, generator=generator) * 4
        rows = torch.randperm(number, generator=generator).view(shape).int()
    return made | {
        "peeks": torch.randint(0, 2, (batch,), generator=generator, dtype=torch.int32),
        "seen_block": block,
        "seen_exact": torch.randint(0, 2, (batch, count), generator=generator, dtype=torch.int32),
        "seen_revealed": (revealed.long() << torch.arange(length)).sum(2),
        "seen_tokens": torch.where(known, current, drawn),
        "seen_prob": prob,
        "seen_log_odds": torch.logit(prob.double(), eps=1e-9).float(),
        "seen_entropy": uniform() * 2,
        "seen_sharpness": torch.rand(batch, generator=generator) * 2,
        "seen_rows": None if rows is None else torch.where(revealed, -1, rows),
        "seen_logits": None if logits is None else logits.to(made["draft_logits"].dtype),
        "order_shift": uniform() * 2 - 1 if head else None,
        "order_pair": uniform(length) * 2 - 1 if head else None,
    }


def random_case(number, logits=False):
    """Ragged batches with idle slots, settings of their own, partly known blocks, tokens that wait, ties, NaN, odd
    schedules and tight budgets."""
    chance = random.Random(number)
    pick = chance.choice
    batch, ahead = pick([0, 1, 2, 2, 3, 3, 3]), pick([0, 1, 2, 2, 2, 3, 3, 3])
    length = pick([*range(1, 10), 4, 4, 20, 64])
    states = pick([1, 5, 16, 16, 16, 40, 40, 40])

    def slots(values, dtype):
        return torch.tensor([pick(values) for _ in range(batch)], dtype=dtype)

    def counts():
        if chance.random() < 0.1:
            return [chance.randint(0, 3) for _ in range(chance.randint(0, length))]
        return even(length, pick([length, length, (length + 1) // 2, chance.randint(1, length)]))

    begins = [[], [], range(0, length, 4), range(0, length, 3), [1, length // 2]]
    thresholds = [0.0, 0.5, 0.7, 0.9, 1.0, 3.0, math.inf]
    start = slots([-1, 0, *[length, 3 * length] * 4], torch.int32)
    made = arguments(
        *(
            batch,
            ahead,
            length,
            number,
            [(counts(), pick(STRATEGIES), pick(thresholds), pick(begins)) for _ in range(batch)],
        ),
        slots([0, 1, 2, *[3, 4, 4] * 3], torch.int32),
        start=start,
        pending=pick([0, 1, 2, 2]),
        max_states=states,
        row_budget=ints(pick([0, 7 * length, 20 * length, *[10**6] * 9])),
        logits_rows=batch * length * pick([1, 2, 5, *[states] * 6]),
    )
    behind = slots(range(made["pending"] * length + 1), torch.int32) * slots([0, 1, 1], torch.int32)
    made["kv_len"] = (start - behind).clamp(min=0)
    made["step"] = slots([*[0] * 15, 1, 2], torch.int32)
    made["draft_end"] = slots([0, 1, 2, *[NEVER] * 9], torch.int32)
    made["proposal_depth"] = slots([*[ahead] * 5, ahead // 2, ahead + 1], torch.int32)
    made["order_sharpness"] = torch.tensor([pick([0.0, 0.5, 1.0, 2.0]) for _ in range(batch * ahead)]).view(
        batch, ahead
    )
    made["draft_calibration"] = slots([0.0, 0.7, 0.9, *[1.0] * 9], torch.float32)
    made["min_visit_prob"] = slots([0.0, 0.0, 0.0, 1e-3, 0.05], torch.float32)
    made["revealed"] = slots([*[0] * 12, 1, 2, 5, -(2**63), -1], torch.int64)
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
        made["draft_tokens"] = made["draft_logits"].argmax(dim=3)
        made["temperature"] = slots([0.0, 0.3, 0.8], torch.float32)
        made["seed"] = slots(range(-9, 9), torch.int64)
        if chance.random() < 0.5:
            made["top_k"], made["top_p"] = slots([0, 5], torch.int32), slots([1.0, 0.9], torch.float32)
            made["banned"] = banned_mask([3], VOCABULARY)
    return made


def cases(logits=False):
    return st.integers(0, 2**32 - 1).map(functools.partial(random_case, logits=logits))
