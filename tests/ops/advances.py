"""Slots with walks to apply, made by hand or at random, and the rules of advance_slots replayed."""

from __future__ import annotations

import math
import struct

import torch

from arguments import copy_of, same_bits, signed
from backends import callable_of
from simsd_kernels.advance_slots.arguments import COLUMNS, HEAD, NO_END, SIGNATURE

advance_slots = callable_of("advance_slots")

ORDER = [argument.name for argument in SIGNATURE.arguments]
WRITTEN = [argument.name for argument in SIGNATURE.arguments if argument.written]
DTYPES = {argument.name: argument.dtype for argument in SIGNATURE.arguments}
VOCABULARY = 6


def slot(length=4, blocks=2, states=3, capacity=8, **given):
    """The arguments for one slot: a block of which the walk has revealed the first position."""
    empty = [0] * length
    walk = blocks + 2
    made = {
        "text": [9] * (capacity * length),
        "start": 2 * length,
        "revealed": 0,
        "step": 0,
        "step_map": [5] * length,
        "prob": [0.25] * length,
        "draw_logprob": [-0.75] * length,
        "origin": [2] * length,
        "target_kv_len": 7,
        "draft_kv_len": 100,
        "last_rows": [77] * length,
        "draft_tokens": [[1] * length] * blocks,
        "draft_prob": [[0.5 + k] * length for k in range(blocks)],
        "draft_log_odds": [[1.5 + k] * length for k in range(blocks)],
        "draft_entropy": [[2.5 + k] * length for k in range(blocks)],
        "order_sharpness": [0.125 * (k + 1) for k in range(blocks)],
        "proposal_depth": blocks,
        "draft_end": NO_END,
        "report": [-7] * (HEAD + COLUMNS * walk * length),
        "end": capacity * length,
        "prompt_len": 2 * length,
        "request_epoch": 42,
        "stop_ids": [3, -1],
        "walk_progress": [0, 0, 1, 0, 1, 1, 1],
        "walk_revealed": 1,
        "walk_tokens": [[1] + [0] * (length - 1), *[empty] * (walk - 1)],
        "walk_step_map": [[1] + [0] * (length - 1), *[empty] * (walk - 1)],
        "walk_prob": [[0.5] + [1.0] * (length - 1), *[[1.0] * length] * (walk - 1)],
        "walk_draw_logprob": [[-0.5] + [0.0] * (length - 1), *[[0.0] * length] * (walk - 1)],
        "walk_origin": [[1] + [0] * (length - 1), *[empty] * (walk - 1)],
        "state_rows": [[10 * c + i for i in range(length)] for c in range(states)],
        "block": [0, 0, *[-1] * (states - 2)],
        "draft_blocks_in_rows": 0,
        **given,
    }
    shapes = {
        **dict.fromkeys(("draft_tokens", "draft_prob", "draft_log_odds", "draft_entropy"), (blocks, length)),
        **dict.fromkeys([name for name in ORDER if name.startswith("walk_")][2:], (walk, length)),
        "order_sharpness": (blocks,),
        "state_rows": (states, length),
    }
    tensors = {name: torch.tensor([made[name]], dtype=DTYPES[name]) for name in ORDER}
    return {name: value.view(1, *shapes[name]) if name in shapes else value for name, value in tensors.items()}


def finished(*blocks, length=4, walk=4, tail=(), held=0, **more):
    """Arguments of `slot` for a walk that finished these blocks and revealed `tail` (position -> token) of the next."""
    current = [tail.get(i, 0) for i in range(length)] if tail else [0] * length
    tokens = [*map(list, blocks), current]
    steps = [[1] * length for _ in blocks] + [[int(bool(tail) and i in tail) for i in range(length)]]
    rest = [[0] * length] * (walk - len(tokens))
    return {
        "walk_tokens": tokens + rest,
        "walk_step_map": steps + rest,
        "walk_prob": [[0.5 if step else 1.0 for step in row] for row in steps + rest],
        "walk_draw_logprob": [[-0.5 * step for step in row] for row in steps + rest],
        "walk_origin": steps + rest,
        "walk_revealed": signed(sum(1 << i for i in tail)),
        "walk_progress": [len(blocks), held, 5, 1, len(tail), 3, 2],
        **more,
    }


def batch_of(cases):
    return {name: torch.cat([case[name] for case in cases]) for name in ORDER}


def advance(case, backend=None):
    """Applies the walk; checks that nothing but the slots changes."""
    before = copy_of(case)
    assert advance_slots(**case, backend=backend) is None
    for name in set(ORDER) - set(WRITTEN):
        assert same_bits(case[name], before[name]), name
    return case


def replay(case, b):
    """What the rules make of slot b, position by position: the written arguments as lists."""
    was = {name: case[name][b].tolist() for name in ORDER}
    now = {name: case[name][b].tolist() for name in WRITTEN}
    length, blocks = len(was["step_map"]), len(was["draft_tokens"])
    report, start = now["report"], was["start"]
    f, held, taken, last, steps, judged, accepted = was["walk_progress"]
    for n in range(len(report)):
        if n not in (HEAD - 2, HEAD - 1):
            report[n] = 0
    report[0] = was["request_epoch"]
    if start < 0 or last < 0:
        return now

    bits = was["walk_revealed"]
    ended = counts = False
    for k in range(f):
        for i in range(length):
            token = was["walk_tokens"][k][i]
            if token >= 0 and token in was["stop_ids"] and start + k * length + i >= was["prompt_len"]:
                ended = True
        if ended:
            counts = k + 1 < f
            f = k + 1
            break
    if counts:  # finished blocks that do not count
        bits = steps = 0
    revealed = [i for i in range(length) if bits >> i & 1]
    failed = False
    for k in range(f + 1):
        for i in range(length) if k < f else revealed:
            now["text"][start + k * length + i] = was["walk_tokens"][k][i]
            if was["walk_step_map"][k][i] > 0 and not was["walk_prob"][k][i] > 0:
                failed = True
    ended = ended or start + f * length >= was["end"]

    depth = min(was["proposal_depth"], blocks)
    same = 0
    while same < min(f, depth) and was["walk_tokens"][same] == was["draft_tokens"][same]:
        same += 1
    now["target_kv_len"] = start + min(held, f) * length
    now["draft_kv_len"] = min(was["draft_kv_len"], start + same * length)
    if f == same and depth > f and all(was["walk_tokens"][f][i] == was["draft_tokens"][f][i] for i in revealed):
        for name in ("draft_tokens", "draft_prob", "draft_log_odds", "draft_entropy", "order_sharpness"):
            for k in range(blocks - f):
                now[name][k] = was[name][k + f]
        now["proposal_depth"] = depth - f
        now["draft_end"] -= f if was["draft_end"] < 2**30 else 0
    else:
        now["proposal_depth"], now["draft_end"] = 0, 2**30

    for name, empty in (("step_map", 0), ("prob", 1.0), ("draw_logprob", 0.0), ("origin", 0)):
        now[name] = [empty] * length if counts else was["walk_" + name][f]
    now["revealed"], now["step"] = bits, steps
    now["start"] = -1 if failed or ended else start + f * length
    inside = steps > 0 and was["block"][last] == f
    now["last_rows"] = [was["state_rows"][last][i] if inside and i not in revealed else -1 for i in range(length)]
    report[1:14] = [
        *(1, f, taken, steps, judged, accepted),
        sum(number >= 0 for number in was["block"]) + was["draft_blocks_in_rows"],
        *(int(failed), int(ended), *struct.unpack("<ii", struct.pack("<q", bits))),
        sum(row >= 0 for row in now["last_rows"]),
        now["proposal_depth"],
    ]
    flat = lambda name: [x for row in was[name] for x in row]  # noqa: E731
    as_bits = lambda name: [struct.unpack("<i", struct.pack("<f", x))[0] for x in flat(name)]  # noqa: E731
    report[HEAD:] = [
        *(*flat("walk_tokens"), *flat("walk_step_map"), *as_bits("walk_prob"), *as_bits("walk_draw_logprob")),
        *flat("walk_origin"),
    ]
    return now


def random_case(seed, sizes):
    """Slots in any state with walks of any length, that agree with their proposals often and seldom fail."""
    batch, blocks, length, states, stops = sizes
    generator = torch.Generator().manual_seed(seed)

    def ints(low, high, *shape, dtype=torch.int32):
        return torch.randint(low, high, shape, generator=generator, dtype=dtype)

    def floats(*shape):
        return torch.rand(shape, generator=generator) + 0.01

    def chance(p, *shape):
        return torch.rand(shape, generator=generator) < p

    walk, capacity = blocks + 2, blocks + 5
    walked = ints(0, walk, batch)
    progress = torch.stack(
        (walked, *(ints(0, walk, batch), ints(1, 9, batch), ints(-1, states, batch)), *ints(0, 4, 3, batch)), 1
    )
    first = (torch.rand(batch, generator=generator) * (capacity - walked)).int()
    first[chance(0.2, batch)] = -1
    start = torch.where(first < 0, -1, first * length)
    revealed = ints(-(2**63), 2**63 - 1, batch, dtype=torch.int64) & ints(-(2**63), 2**63 - 1, batch, dtype=torch.int64)
    revealed &= signed((1 << length) - 1)
    tokens = ints(0, VOCABULARY, batch, walk, length, dtype=torch.int64)
    drafted = torch.where(
        chance(0.7, batch, blocks, 1), tokens[:, :blocks], ints(0, 9, batch, blocks, length, dtype=torch.int64)
    )
    wrong = chance(0.03, batch, walk, 1) & chance(0.5, batch, walk, length)
    bad = torch.tensor([0.0, math.nan, -1.0])[ints(0, 3, batch, walk, length)]
    made = {
        "text": ints(0, 99, batch, capacity * length, dtype=torch.int64),
        "start": start,
        "revealed": ints(-(2**63), 2**63 - 1, batch, dtype=torch.int64),
        "step": ints(0, 5, batch),
        "step_map": ints(0, 5, batch, length),
        "prob": floats(batch, length),
        "draw_logprob": -floats(batch, length),
        "origin": ints(0, 3, batch, length),
        "target_kv_len": ints(0, 50, batch),
        "draft_kv_len": ints(0, capacity * length + 1, batch),
        "last_rows": ints(-1, 50, batch, length),
        "draft_tokens": drafted,
        **{name: floats(batch, blocks, length) for name in ("draft_prob", "draft_log_odds", "draft_entropy")},
        "order_sharpness": floats(batch, blocks),
        "proposal_depth": ints(0, blocks + 2, batch),
        "draft_end": torch.where(chance(0.5, batch), ints(0, blocks + 2, batch), NO_END),
        "report": ints(-9, 9, batch, HEAD + COLUMNS * walk * length),
        "end": ints(1, 2 * capacity * length + 2, batch),
        "prompt_len": ints(0, capacity * length + 1, batch),
        "request_epoch": ints(-(2**31), 2**31 - 1, batch),
        "stop_ids": torch.where(chance(0.1, batch, stops), ints(0, VOCABULARY, batch, stops, dtype=torch.int64), -1),
        "walk_progress": progress,
        "walk_revealed": revealed,
        "walk_tokens": tokens,
        "walk_step_map": ints(0, 9, batch, walk, length),
        "walk_prob": torch.where(wrong, bad, floats(batch, walk, length)),
        "walk_draw_logprob": -floats(batch, walk, length),
        "walk_origin": ints(0, 3, batch, walk, length),
        "state_rows": ints(0, 999, batch, states, length),
        "block": ints(-1, blocks + 1, batch, states),
        "draft_blocks_in_rows": ints(0, blocks + 1, batch),
    }
    return {name: made[name] for name in ORDER}
