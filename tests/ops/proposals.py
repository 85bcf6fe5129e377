"""Blocks to propose, and propose_block as a loop of sample_logits and reveal."""

from __future__ import annotations

import torch

from arguments import copy_of, same_bits, signed
from backends import callable_of
from rules import STRATEGIES, even, rule
from simsd_kernels import banned_mask
from simsd_kernels.propose_block.arguments import SIGNATURE

propose_block, sample_logits, reveal = callable_of("propose_block"), callable_of("sample_logits"), callable_of("reveal")

TENSORS = [argument.name for argument in SIGNATURE.arguments]
WRITTEN = [argument.name for argument in SIGNATURE.arguments if argument.written]
STATISTICS = ("prob", "log_odds", "entropy")
RULE = ("schedule", "steps", "strategy", "threshold", "sub_blocks")
VOCABULARY, NO_END = 11, 2**30


def logits_for(*tokens):
    """A row of logits for each token, which it prefers, the later ones less."""
    rows = torch.zeros(len(tokens), VOCABULARY)
    for n, token in enumerate(tokens):
        rows[n, token] = 8.0 - n
    return rows


def slot(tokens=(5, 6, 7, 8), blocks=2, block=0, noise=0, rules=((2, 2), "sequential", 0.5), **given):
    """The arguments for one slot whose draft prefers `tokens`."""
    length = len(tokens)
    made = {
        "logits": logits_for(*tokens),
        "rows": torch.arange(length, dtype=torch.int32)[None],
        "text": torch.full((1, 5 * length), 1),
        "start": torch.tensor([length], dtype=torch.int32),
        "revealed": torch.tensor([0]),
        "step": torch.tensor([0], dtype=torch.int32),
        "draft_tokens": torch.full((1, blocks, length), -9),
        **{name: torch.full((1, blocks, length), -9.0) for name in STATISTICS},
        "proposal_depth": torch.tensor([0], dtype=torch.int32),
        "draft_end": torch.tensor([NO_END], dtype=torch.int32),
        "prompt_len": torch.tensor([length], dtype=torch.int32),
        "stop_ids": torch.tensor([[9, -1]]),
        "temperature": torch.tensor([0.0]),
        **rule(length, rules),
        "top_k": None,
        "top_p": None,
        "seed": None,
        "banned": None,
    }
    return {**made, **given, "block": block, "noise": noise}


def propose(case, backend=None):
    """Proposes; checks that only the slots change."""
    before = copy_of(case)
    assert propose_block(**case, backend=backend) is None
    for name in set(TENSORS) - set(WRITTEN):
        assert case[name] is None or same_bits(case[name], before[name]), name
    return case


def random_case(seed, noise, batch=3, length=4, blocks=2, dtype=torch.float32, filters=True):
    """Slots with blocks in any state and settings of their own; some take no part."""
    generator = torch.Generator().manual_seed(seed)

    def ints(low, high, *shape, dtype=torch.int32):
        return torch.randint(low, high, shape, generator=generator, dtype=dtype)

    def pick(values):
        return values[int(ints(0, len(values)))]

    rows = batch * length + 3
    scattered = torch.randperm(rows, generator=generator)[: batch * length].view(batch, length).int()
    scattered[torch.rand(batch, generator=generator) < 0.25] = -1
    revealed = ints(-(2**63), 2**63 - 1, batch, dtype=torch.int64) & ints(-(2**63), 2**63 - 1, batch, dtype=torch.int64)
    revealed[::2] = 0
    known = (revealed[:, None] >> torch.arange(length)) & 1 == 1
    scattered[known & (torch.rand(known.shape, generator=generator) < 0.5)] = -1
    takes_part = (scattered >= 0).any(1)
    capacity, block = blocks + 4, int(ints(0, blocks))
    rules, steps = [], []
    for _ in range(batch):
        count = int(ints(1, length + 1))
        schedule = pick([even(length, count), ints(0, 4, count).tolist()])
        rules.append((schedule, pick(STRATEGIES), pick([0.1, 0.4, 1.0, 3.0]), pick([[], [1, length // 2]])))
        steps.append(int(ints(0, count)))
    temperature = torch.rand(batch, generator=generator) + 0.3
    temperature[torch.rand(batch, generator=generator) < (0.25 if noise else 2)] = 0.0
    shape = batch, blocks, length
    return {
        "logits": (torch.randn(rows, VOCABULARY, generator=generator) * 2).to(dtype),
        "rows": scattered,
        "text": ints(0, 99, batch, capacity * length, dtype=torch.int64),
        "start": torch.where(takes_part, ints(0, capacity - blocks, batch) * length, -1),
        "revealed": revealed,
        "step": torch.tensor(steps, dtype=torch.int32),
        "draft_tokens": ints(0, 99, *shape, dtype=torch.int64),
        **{name: torch.randn(shape, generator=generator) for name in STATISTICS},
        "proposal_depth": ints(0, blocks + 1, batch),
        "draft_end": torch.where(torch.rand(batch, generator=generator) < 0.5, 1, NO_END).int(),
        "prompt_len": ints(0, capacity * length, batch),
        "stop_ids": torch.where(
            torch.rand((batch, 2), generator=generator) < 0.5, ints(0, VOCABULARY, batch, 2, dtype=torch.int64), -1
        ),
        "temperature": temperature,
        **rule(length, *rules),
        "top_k": ints(0, 6, batch) if filters else None,
        "top_p": torch.rand(batch, generator=generator) * 0.5 + 0.5 if filters else None,
        "seed": ints(-(2**63), 2**63 - 1, batch, dtype=torch.int64) if noise else None,
        "banned": banned_mask(ints(0, VOCABULARY, 2), VOCABULARY) if filters else None,
        "block": block,
        "noise": noise,
    }


def loop(case, b, backend):
    """What slot b holds afterwards, by sample_logits and reveal, one position and one step at a time."""
    length, block = case["rows"].shape[1], case["block"]
    now = {name: case[name][b].clone() for name in WRITTEN}
    first = int(case["start"][b]) + block * length
    step = int(case["step"][b])
    masked = [i for i in range(length) if not int(case["revealed"][b]) >> i & 1]
    if not (case["rows"][b] >= 0).any():
        return now
    revealed = signed(sum(1 << i for i in range(length) if i not in masked))

    def draw(i, known):
        sequential = STRATEGIES[int(case["strategy"][b])] == "sequential"
        one = lambda name, default: torch.tensor([default]) if case[name] is None else case[name][b : b + 1]  # noqa: E731
        return sample_logits(
            case["logits"][int(case["rows"][b, i])][None],
            case["temperature"][b : b + 1],
            one("top_k", 0).int(),
            one("top_p", 1.0),
            one("seed", 0),
            torch.tensor([first + i], dtype=torch.int32),
            torch.tensor([0 if sequential else known]),
            case["banned"],
            backend=backend,
        )

    tokens = now["text"][first : first + length].clone()
    for i in masked:
        drawn = draw(i, revealed)
        tokens[i] = drawn.token
        for name in STATISTICS:
            now[name][block, i] = getattr(drawn, name)
    known, step_map = torch.tensor([revealed]), torch.zeros(1, length, dtype=torch.int32)
    for now_step in range(step, int(case["steps"][b])):
        drawn = [
            draw(i, int(known)) if not int(known) >> i & 1 else (torch.tensor([0]), *[torch.tensor([0.0])] * 3)
            for i in range(length)
        ]
        columns = [torch.cat([one[n] for one in drawn])[None] for n in range(4)]
        rules = {name: case[name][b : b + 1] for name in RULE}
        now_step = torch.tensor([now_step], dtype=torch.int32)
        reveal(tokens[None], known, step_map, *columns, now_step, **rules, backend=backend)
    now["draft_tokens"][block] = tokens
    now["text"][first : first + length] = tokens
    now["proposal_depth"].fill_(block + 1)
    stops = [int(token) for token in case["stop_ids"][b] if token >= 0]
    if any(int(tokens[i]) in stops and first + i >= int(case["prompt_len"][b]) for i in range(length)):
        now["draft_end"].fill_(block + 1)
    return now


def as_one_by_one(case, backend):
    expected = [loop(case, b, backend) for b in range(case["rows"].shape[0])]
    propose(case, backend)
    for b, one in enumerate(expected):
        for name in WRITTEN:
            assert same_bits(case[name][b], one[name]), (b, name)
