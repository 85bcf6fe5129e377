"""Logits of every kind that a kernel may meet, what goes with them, and calls of sample_logits."""

from __future__ import annotations

import math

import torch

import simsd_kernels
from arguments import Pick, relaid
from backends import FLOATS, callable_of, sized

INF = math.inf
# Around vectors, warps and pieces of a row: of CUDA's segments, and of Triton's chunks of 4096.
VOCABULARIES = (1, 2, 3, 4, 7, 8, 9, 16, 31, 33, 129, 255, 257, 1000, 1023, 1024, 1025, 2048, 2055, 3073, 4095, 4096)
VOCABULARIES += (4097, 5000, 8197)


def random_values(pick: Pick, *shape: int) -> torch.Tensor:
    logits = pick.normal(*shape) * pick(0.01, 0.1, 1.0, 4.0, 30.0)
    kind = pick("plain", "plain", "ties", "constant", "spike", "holes", "infinite", "few")
    if kind == "ties":
        logits = (logits * 2).round() / 2  # also of -0 and 0
    elif kind == "constant":
        logits = torch.zeros(shape) + pick(0.0, -3.0, 1e4)
    elif kind == "spike":
        logits[..., int(pick.integers(0, shape[-1]))] += pick(30.0, 200.0, 5000.0)
    elif kind == "holes":
        logits[pick.uniform(*shape) < 0.3] = pick(-INF, math.nan)
    elif kind == "infinite":
        logits[pick.uniform(*shape) < 2 / shape[-1]] = INF
    elif kind == "few":
        logits[pick.uniform(*shape) < 1 - 2 / shape[-1]] = -INF
    if shape[0] and pick(*[False] * 9, True):
        logits[0] = pick(math.nan, -INF)
    return logits


def random_banned(pick: Pick, vocabulary: int) -> list[int] | None:
    match pick("none", "none", "some", "all but one"):
        case "some" if vocabulary > 1:
            spared = int(pick.integers(0, vocabulary))
            ids = pick.integers(0, vocabulary, min(vocabulary, 40))
            return ids[ids != spared].tolist()
        case "all but one":
            spared = int(pick.integers(0, vocabulary))
            return [id for id in range(vocabulary) if id != spared]
    return None


sample_logits = callable_of("sample_logits")
NAMES = ("logits", "temperature", "top_k", "top_p", "seed", "position", "revealed", "banned")


def arguments(logits, temperature=1.0, top_k=0, top_p=1.0, seed=0, position=None, revealed=0, banned=None):
    """The op's arguments, scalars spread over the rows; position counts the rows unless given."""
    rows = logits.shape[0]
    position = torch.arange(rows) if position is None else position

    def spread(value, dtype):
        return torch.as_tensor(value).to(dtype).expand(rows).clone()

    return (
        logits,
        spread(temperature, torch.float32),
        spread(top_k, torch.int32),
        spread(top_p, torch.float32),
        spread(seed, torch.int64),
        spread(position, torch.int32),
        spread(revealed, torch.int64),
        None if banned is None else simsd_kernels.banned_mask(banned, logits.shape[1]),
    )


def sample(logits, *, backend, **settings):
    return sample_logits(*arguments(logits, **settings), backend=backend)


def random_case(seed: int):
    """Logits, and settings of their own for each row."""
    pick = Pick(seed)
    rows, vocabulary = pick(0, *[1, 1, 2, 3, 5] * 5, 17), pick(*VOCABULARIES)
    rows = sized(rows, interpreted=min(rows, 3))
    logits = relaid(random_values(pick, rows, vocabulary).to(pick(*FLOATS)), pick)
    filtered = pick(False, True)
    settings = {
        "temperature": pick.each(rows, 0.0, 0.3, 0.9, 1.0, 1.0, 7.0, 1e6),
        "top_k": pick.each(rows, 0, 1, 2, 7, 40, vocabulary // 2, vocabulary, vocabulary + 5) if filtered else 0,
        "top_p": pick.each(rows, 1.0, 1.0, 0.0, 0.1, 0.5, 0.9, 0.999, 1 - 2.0**-24) if filtered else 1.0,
        "seed": pick.integers(-(2**63), 2**63 - 1, rows),
        "position": pick.integers(-(2**31), 2**31 - 1, rows),
        "revealed": pick.integers(-(2**63), 2**63 - 1, rows),
        "banned": random_banned(pick, vocabulary),
    }
    return logits, settings


def row_of(logits, settings, row):
    one = {name: value[row : row + 1] if torch.is_tensor(value) else value for name, value in settings.items()}
    return logits[row : row + 1], one


def random_logits(rows, vocabulary, seed=0, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocabulary, generator=generator) * scale).to(dtype)
