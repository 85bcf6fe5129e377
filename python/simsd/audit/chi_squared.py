"""Goodness of fit by Pearson's chi-squared, with its tail from the incomplete gamma function."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

EXPECTED = 10.0  # draws that a cell must expect: below, the statistic is not chi-squared


@dataclasses.dataclass(frozen=True)
class Fit:
    """`p`: probability of a statistic this large by chance; `cells`: after rare ones were pooled."""

    statistic: float
    cells: int
    p: float


def tail(statistic: float, freedom: int) -> float:
    """P(chi-squared with `freedom` degrees >= statistic)."""
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def against_law(counts: Tensor, law: Tensor) -> Fit | None:
    """`counts` [V] of draws against probabilities `law` [V]; None where fewer than two cells are full enough."""
    counts, expected = counts.double(), law.double() / law.double().sum() * counts.sum()
    if counts[expected == 0].sum() > 0:
        return Fit(torch.inf, int((expected > 0).sum()), 0.0)  # what has no probability was drawn
    counts, expected = _pool(expected, counts, expected)
    if len(counts) < 2:
        return None
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return Fit(statistic, len(counts), tail(statistic, len(counts) - 1))


def two_samples(first: Tensor, second: Tensor) -> Fit | None:
    """Whether counts `first` and `second`, both [n], come from one law; None as in `against_law`."""
    first, second = first.double(), second.double()
    sizes = first.sum(), second.sum()
    if not min(sizes) > 0:
        return None
    expected = (first + second) * min(sizes) / sum(sizes)  # in the smaller sample
    first, second = _pool(expected, first, second)
    if len(first) < 2:
        return None
    ratio = (sizes[1] / sizes[0]).sqrt()
    statistic = float(((ratio * first - second / ratio) ** 2 / (first + second)).sum())
    return Fit(statistic, len(first), tail(statistic, len(first) - 1))


def total_variation(first: Tensor, second: Tensor) -> float:
    """Half the sum of differences between two samples' shares."""
    shares = (counts.double() / counts.sum().clamp(min=1) for counts in (first, second))
    return float((next(shares) - next(shares)).abs().sum() / 2)


def _pool(expected: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
    """Adds up the cells that expect fewer than EXPECTED draws; with the smallest full one where they still do."""
    order = expected.argsort(descending=True)
    expected = expected[order]
    full = int((expected >= EXPECTED).sum())
    rest = float(expected[full:].sum())
    if 0 < rest < EXPECTED and full:
        full -= 1
    pooled = []
    for column in (column[order] for column in columns):
        tail_sum = column[full:].sum(0, keepdim=True)
        pooled.append(torch.cat([column[:full], tail_sum]) if rest > 0 else column[:full])
    return tuple(pooled)
