"""Logits of every kind that a kernel may meet, and what goes with them."""

from __future__ import annotations

import math

import torch

from arguments import Pick

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
